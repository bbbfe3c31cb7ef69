"""Compiling the CPU kernels, living without them, and saying so."""

import re
import runpy
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from dino_d2.ops import backends, build, compiled, dispatch, embedding_bag, reference


def tensors(device="meta", value=torch.float32, points=torch.float32):
    return torch.empty(0, dtype=value, device=device), torch.empty(0, dtype=points, device=device)


# ---- compiling


@pytest.mark.slow
def test_the_kernels_compile_where_there_is_a_compiler(tmp_path):
    if build.shutil.which("c++") is None:
        pytest.skip("there is no compiler called c++")
    assert build.build(tmp_path / "new" / "folder") == ""
    assert (tmp_path / "new" / "folder" / build.LIBRARY).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", r"there is no C\+\+ compiler called no-such-compiler"),
        ("false", r"compiling failed \(false: no message\)"),
        (f"{sys.executable} -c 1/0", r"compiling failed .*Traceback"),
    ],
)
def test_without_a_compiler_a_note_takes_the_place_of_the_library(
    compiler, reason, tmp_path, monkeypatch
):
    monkeypatch.setenv("CXX", compiler)
    for name in (build.LIBRARY, "ms_deform_attn_cpu.01234567.so"):
        (tmp_path / name).write_text("of an older version")
    build.build(tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == [build.REASON]
    assert re.search(reason, compiled.load_library(tmp_path))


def test_an_isolated_build_finds_the_pytorch_that_it_cannot_import(tmp_path, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "PyTorch was not installed" in build.build(tmp_path)
    (tmp_path / "torch" / "include").mkdir(parents=True)
    assert build.find_torch() == tmp_path / "torch"


def test_windows_is_told_what_the_kernels_need(monkeypatch, tmp_path):
    monkeypatch.setattr(build.sys, "platform", "win32")
    assert "GCC and Clang" in build.build(tmp_path)


# ---- loading


def test_a_library_of_other_sources_is_not_loaded(tmp_path):
    (tmp_path / "ms_deform_attn_cpu.01234567.so").write_text("of an older version")
    assert compiled.load_library(tmp_path) == "they have not been compiled"


def test_a_damaged_library_is_named(tmp_path):
    (tmp_path / build.LIBRARY).write_text("no library")
    assert f"{tmp_path / build.LIBRARY} cannot be loaded" in compiled.load_library(tmp_path)


# ---- choosing


@pytest.fixture
def without_compiled(monkeypatch):
    monkeypatch.setattr(dispatch, "WHY_NOT_COMPILED", "nobody compiled them")
    dispatch.warn_once.cache_clear()


@pytest.fixture
def with_compiled(monkeypatch):
    monkeypatch.setattr(dispatch, "WHY_NOT_COMPILED", "")


def test_the_compiled_kernels_are_chosen_for_what_they_can_do(with_compiled):
    for dtype in (torch.float32, torch.bfloat16):
        assert dispatch.kernels_for(*tensors("cpu", dtype)) is compiled
    assert dispatch.kernels_for(*tensors("cpu", torch.float16)) is embedding_bag
    double = tensors("cpu", torch.float64, torch.float64)
    assert dispatch.kernels_for(*double) is reference


def on_cuda(dtype=torch.float32):
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype)


def test_a_gpu_gets_triton_where_it_is_installed(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "WHY_NOT_TRITON", "")
    assert dispatch.kernels_for(on_cuda(), on_cuda()).__name__ == "dino_d2.ops.triton_kernels"
    assert dispatch.kernels_for(on_cuda(), on_cuda(torch.float64)) is reference


def test_a_gpu_without_triton_is_warned_about(monkeypatch):
    monkeypatch.setattr(dispatch, "WHY_NOT_TRITON", "Triton is not installed")
    dispatch.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="its CUDA kernels.*not installed; install triton"):
        assert dispatch.kernels_for(on_cuda(), on_cuda()) is reference


def test_other_devices_get_plain_pytorch(with_compiled):
    assert dispatch.kernels_for(*tensors("meta")) is reference


def test_missing_kernels_are_warned_about_once_with_the_remedy(without_compiled):
    with pytest.warns(UserWarning, match=r"nobody compiled them; `python -m dino_d2.ops --build`"):
        assert dispatch.kernels_for(*tensors("cpu")) is embedding_bag
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.kernels_for(*tensors("cpu"))


def test_backends_says_what_is_live_and_why_nothing_faster_is(without_compiled):
    cpu, cuda = backends()
    assert cpu == ("cpu", "embedding_bag, grid_sample", "nobody compiled them")
    if not torch.cuda.is_available():
        assert cuda == ("cuda", "grid_sample", "there is no CUDA device")


def test_backends_names_the_instruction_set(with_compiled, monkeypatch):
    monkeypatch.setattr(compiled, "CAPABILITY", "AVX2")
    assert backends()[0] == ("cpu", "C++ (AVX2)", "")


# ---- python -m dino_d2.ops


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ops", *arguments])
    runpy.run_module("dino_d2.ops", run_name="__main__")


def test_the_program_prints_a_line_per_device(without_compiled, monkeypatch, capsys):
    run(monkeypatch)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("cpu: embedding_bag") and "nobody compiled them" in first
    assert second.startswith("cuda: ")


def test_the_program_builds_the_kernels_or_says_why_not(monkeypatch, capsys):
    monkeypatch.setattr(build, "build", lambda: "")
    run(monkeypatch, "--build")
    assert build.LIBRARY in capsys.readouterr().out
    monkeypatch.setattr(build, "build", lambda: "it rains")
    with pytest.raises(SystemExit, match="because it rains"):
        run(monkeypatch, "--build")
