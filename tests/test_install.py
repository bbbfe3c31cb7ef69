"""The program `install.py`: which releases it accepts, and what it leaves as it is."""

import json
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

PROGRAMS = Path(__file__).parents[1] / "projects" / "dino"
sys.path.insert(0, str(PROGRAMS))
import install  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """What would have been installed, where PyTorch works."""
    calls = []
    works = SimpleNamespace(returncode=0)
    monkeypatch.setattr(install.subprocess, "run", lambda *words, **options: works)
    monkeypatch.setattr(install, "pip", lambda *words: calls.append([*map(str, words)]))
    monkeypatch.setattr(install, "add_detectron2", lambda scratch: calls.append(["detectron2"]))
    return calls


@pytest.fixture
def has(monkeypatch):
    """An environment with the distributions of a dict of versions."""

    def set_up(**versions):
        def version(name):
            if name not in versions:
                raise PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(install, "version", version)

    return set_up


@pytest.fixture
def comes_from(monkeypatch):
    """An environment whose dino_d2 is installed from a folder; None: it has none."""

    def set_up(folder):
        def distribution(name):
            if folder is None:
                raise PackageNotFoundError(name)
            origin = json.dumps({"url": Path(folder).as_uri(), "dir_info": {"editable": True}})
            return SimpleNamespace(read_text=lambda file: origin)

        monkeypatch.setattr(install, "distribution", distribution)

    return set_up


def write_wheel(folder, name, version, *requires):
    lines = [f"Requires-Dist: {x}\n" for x in requires]
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        file.writestr(f"{info}/METADATA", head + "".join(lines))
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Releases as they are: only some name the torch that they go with."""
    folder = tmp_path_factory.mktemp("index")
    for torch in ("2.9.1", "2.10.0", "2.14.1", "2.15.0", "2.16.0"):
        write_wheel(folder, "torch", torch)
    write_wheel(folder, "torchvision", "0.24.1", "torch==2.9.1")
    write_wheel(folder, "torchvision", "0.25.0", "torch==2.10.0")
    for torchvision in ("0.29.1", "0.29.2"):
        write_wheel(folder, "torchvision", torchvision, "torch>=2.14.0")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constraints", "chosen"),
    [
        ((), {"torch": "2.15.0", "torchvision": "0.29.2"}),
        (("torch<=2.14.1", "torchvision<=0.29.1"), {"torch": "2.14.1", "torchvision": "0.29.1"}),
        (("torch<2.14",), {"torch": "2.10.0", "torchvision": "0.25.0"}),
        (("torchvision==0.25.0",), {"torch": "2.10.0", "torchvision": "0.25.0"}),
    ],
)
def test_pip_takes_the_newest_pytorch_that_its_constraints_allow(
    constraints, chosen, index, tmp_path, monkeypatch
):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "constraints.txt").write_text("\n".join(constraints))
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    source = ["--no-index", "--find-links", index, "--constraint", tmp_path / "constraints.txt"]
    command = [*pip, "--report", "-", *source, *install.PYTORCH]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    found = (x["metadata"] for x in report["install"])
    assert {x["name"]: x["version"] for x in found} == chosen


def test_a_pytorch_that_is_there_is_kept(calls, has, comes_from, tmp_path):
    has(torch="2.13.0+cpu", torchvision="0.28.0+cpu")
    comes_from(None)
    install.main([])
    (words,) = (x for x in calls if "--editable" in x)
    assert {"torch==2.13.0+cpu", "torchvision==0.28.0+cpu"} <= set(words)
    assert not any(set(install.PYTORCH) & set(x) for x in calls)


@pytest.mark.parametrize("index", ["", "https://download.pytorch.org/whl/cpu"])
def test_a_missing_pytorch_comes_from_the_index_that_is_named(index, calls, has, comes_from):
    has()
    comes_from(None)
    install.main(["--pytorch-index", index])
    assert calls[0] == ["install", *(["--index-url", index] if index else []), *install.PYTORCH]


def test_a_torchvision_of_another_pytorch_is_one_sentence(calls, has, monkeypatch):
    has(torch="2.13.0+cpu")
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nRuntimeError: no operator nms\n")
    monkeypatch.setattr(install.subprocess, "run", lambda *words, **options: failed)
    with pytest.raises(SystemExit, match=r"torch==2.13.0\+cpu do not work .*no operator nms"):
        install.check_pytorch()


def test_an_environment_of_another_checkout_is_left_alone(calls, comes_from, tmp_path):
    comes_from(tmp_path)
    with pytest.raises(SystemExit, match=f"installed from {tmp_path}.*REPOINT=yes"):
        install.main([])
    assert not calls


@pytest.mark.slow
@pytest.mark.parametrize("folder", [install.ROOT, "/nowhere/dino_d2", None])
def test_an_environment_of_this_checkout_or_of_a_deleted_one_is_set_up(folder, calls, comes_from):
    comes_from(folder)
    install.main([])
    assert calls


def test_an_environment_of_another_checkout_is_set_up_where_that_is_asked_for(
    calls, comes_from, tmp_path
):
    comes_from(tmp_path)
    install.main(["--repoint"])
    assert calls


def test_help_installs_nothing(calls, capsys):
    with pytest.raises(SystemExit) as ended:
        install.main(["--help"])
    assert ended.value.code == 0 and "--pytorch-index URL" in capsys.readouterr().out
    assert not calls


def test_control_c_ends_it_with_a_sentence(comes_from, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    comes_from(None)
    monkeypatch.setattr(install, "install", interrupt)
    with pytest.raises(SystemExit, match="Interrupted. Run the same command again"):
        install.main([])
