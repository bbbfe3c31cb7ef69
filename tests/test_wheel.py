"""The wheel: for any Python, with the CPU kernels in it where there is a compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import dino_d2
from dino_d2.ops.build import LIBRARY, REASON

ROOT = Path(__file__).parents[1]
PARTS = ["dino_d2", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE"]


def build(tmp_path, **environment):
    """A wheel of a copy of the sources, and the names of its files."""
    sources, out = tmp_path / "sources", tmp_path / "dist"
    sources.mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name)
    for library in sources.glob("dino_d2/ops/ms_deform_attn_cpu.*"):
        library.unlink()
    words = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(sources)]
    command = [sys.executable, "-m", "pip", *words]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    (wheel,) = out.iterdir()
    return wheel, zipfile.ZipFile(wheel).namelist()


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_a_machine_without_a_compiler_gets_the_kernels(tmp_path):
    wheel, names = build(tmp_path)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"dino_d2-{dino_d2.__version__}-py3-none-{platform}.whl"
    assert f"dino_d2/ops/{LIBRARY}" in names
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    shown = subprocess.run(
        [sys.executable, "-m", "dino_d2.ops"],
        env=os.environ | {"PYTHONPATH": str(target), "CXX": "no-such-compiler"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "C++" in shown, shown


@pytest.mark.nightly
def test_without_a_compiler_it_is_pure(tmp_path):
    wheel, names = build(tmp_path, CXX="no-such-compiler")
    reason = zipfile.ZipFile(wheel).read(f"dino_d2/ops/{REASON}").decode()
    assert reason == "where it was built, there is no C++ compiler called no-such-compiler"
    assert wheel.name == f"dino_d2-{dino_d2.__version__}-py3-none-any.whl"
    assert not [x for x in names if x.endswith(".so")]
    assert "dino_d2/configs/quickstart.yaml" in names and "dino_d2/ops/csrc/kernels.cpp" in names
