"""Complete the environment of the interpreter that runs this (`make` does): PyTorch and Detectron2
where they are missing, and dino_d2 in editable mode. What is there already is left as it is."""

import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The newest that the tests have passed with. Python 3.10 gets torch 2.14, its last.
PYTORCH = ["torch<2.16", "torchvision==0.29.2"]

# PyPI has no `detectron2`. This is its main branch of 2024, packed by the authors of SAL for Python
# 3.10. Everything in it that DINO uses is plain Python: the rest of the wheel, an extension for one
# old PyTorch and a folder `tools`, is left out. Not ours, hence the checksum.
DETECTRON2 = "sal-detectron2==0.7.2"
DETECTRON2_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
# Tells the Detectron2 that is put here from one of the user.
ORIGIN = Path(sysconfig.get_path("purelib"), "detectron2", "ORIGIN")


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if code := subprocess.call([str(argument) for argument in command], cwd=ROOT):
        sys.exit(code)  # pip has said why


def add_detectron2(scratch):
    pip(
        *("download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.10"),
        *("--dest", scratch, DETECTRON2),
    )
    (wheel,) = scratch.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != DETECTRON2_SHA256:
        sys.exit(f"{wheel.name} is not the file that was tested.")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("detectron2/") and not name.endswith(".so"):
                archive.extract(name, scratch)
    (scratch / "detectron2" / ORIGIN.name).write_text(f"{DETECTRON2} without its compiled part\n")
    # At once, because half a package would count as installed.
    (scratch / "detectron2").rename(ORIGIN.parent)


def installed(name):
    try:
        return [f"{name}=={version(name)}"]
    except PackageNotFoundError:
        return []


def main(scratch):
    # On the disk of the environment: /tmp may be in memory, and too small for PyTorch.
    os.environ["TMPDIR"] = str(scratch)
    if subprocess.call([sys.executable, "-m", "pip", "--version"], stdout=subprocess.DEVNULL):
        subprocess.call([sys.executable, "-m", "ensurepip"])

    if not installed("torch"):
        print(
            "Installing PyTorch. On Linux it comes with CUDA: 2.7 GB to download, 6 GB on disk,\n"
            "about two minutes on a fast line.",
            flush=True,
        )
        pip("install", *PYTORCH)

    # Naming the versions that are there makes pip keep them, or fail where it cannot.
    requirements = installed("torch") + installed("torchvision")
    print("Installing dino_d2 beside", *requirements, flush=True)
    has_detectron2 = find_spec("detectron2") is not None
    if not has_detectron2 or ORIGIN.exists():
        requirements += ["--requirement", "requirements.txt"]
    # After PyTorch, whose headers the CPU kernels are compiled with.
    pip("install", "--quiet", *requirements, "--editable", ".[dev]")
    if not has_detectron2:
        print("Adding Detectron2 (7 MB)", flush=True)
        add_detectron2(scratch)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
        main(Path(folder))
