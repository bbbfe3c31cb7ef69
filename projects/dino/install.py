"""Complete the environment of the running interpreter, as `make` does.

Installs PyTorch and Detectron2 if they are missing, and dino_d2 in editable mode. Does not change
installed packages.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

ROOT = Path(__file__).resolve().parents[2]

# Versions that passed the tests. pip installs the newest that index and constraints allow.
PYTORCH = ["torch>=2.10,<2.16", "torchvision>=0.25"]
FROM_PIPS_INDEX = """\
Installing PyTorch. On Linux it comes with CUDA: 2.7 GB to download, 6 GB on disk, about two minutes
on a fast line. The CPU-only build is a tenth of that: see PYTORCH_INDEX in `make help`."""

# PyPI has no `detectron2`. This is its main branch of 2024, packaged by the authors of SAL for
# Python 3.10. DINO only uses its plain Python: the rest of the wheel, an extension for an old
# PyTorch and a folder `tools`, is not installed. A file of a third party, hence the checksum.
DETECTRON2 = "sal-detectron2==0.7.2"
DETECTRON2_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
# Distinguishes this Detectron2 from one that the user installed.
ORIGIN = Path(sysconfig.get_path("purelib"), "detectron2", "ORIGIN")


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if code := subprocess.call([str(argument) for argument in command], cwd=ROOT):
        sys.exit(code)  # pip has printed why


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
    # Atomically, as an incomplete package would count as installed.
    (scratch / "detectron2").rename(ORIGIN.parent)


def installed(name):
    try:
        return [f"{name}=={version(name)}"]
    except PackageNotFoundError:
        return []


def other_checkout():
    """The folder of another checkout that this environment takes dino_d2 from, if any."""
    try:
        origin = distribution("dino_d2").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    folder = Path(url2pathname(urlparse(json.loads(origin or "{}").get("url", "")).path))
    # If the other checkout was moved or deleted, the environment may be changed.
    return folder if folder.is_dir() and folder.resolve() != ROOT else None


def add_pytorch(index):
    if index or not installed("torch"):
        print(f"Installing PyTorch from {index}" if index else FROM_PIPS_INDEX, flush=True)
    # Pin the installed versions, so that pip keeps them or fails.
    torch, torchvision = PYTORCH
    requirements = installed("torch") or [torch], installed("torchvision") or [torchvision]
    pip("install", *("--index-url", index) * bool(index), *sum(requirements, []))


def check_pytorch():
    """Check that torchvision fits the installed PyTorch, as pip accepts other combinations, too."""
    check = [sys.executable, "-c", "import torch, torchvision"]
    tried = subprocess.run(check, stderr=subprocess.PIPE, text=True)
    if tried.returncode:
        reason = (tried.stderr.splitlines() or ["no reason given"])[-1]
        sys.exit(
            f"{' and '.join(installed('torch') + installed('torchvision'))} do not work together "
            f"({reason}): remove both and run this again, or install the two from one index."
        )


def install(scratch, index):
    # On the environment's disk, as /tmp may be in memory and too small for PyTorch.
    os.environ["TMPDIR"] = str(scratch)
    if subprocess.call([sys.executable, "-m", "pip", "--version"], stdout=subprocess.DEVNULL):
        subprocess.call([sys.executable, "-m", "ensurepip"])

    if not (installed("torch") and installed("torchvision")):
        add_pytorch(index)
    check_pytorch()

    requirements = installed("torch") + installed("torchvision")
    print("Installing dino_d2 beside", *requirements, flush=True)
    has_detectron2 = find_spec("detectron2") is not None
    if not has_detectron2 or ORIGIN.exists():
        requirements += ["--requirement", "requirements.txt"]
    # After PyTorch, as the CPU kernels need its headers.
    pip("install", "--quiet", *requirements, "--editable", ".[dev]")
    if not has_detectron2:
        print("Adding Detectron2 (7 MB)", flush=True)
        add_detectron2(scratch)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pytorch-index",
        metavar="URL",
        default="",
        help="the index to install PyTorch from if it is missing, such as "
        "https://download.pytorch.org/whl/cpu (default: pip's)",
    )
    parser.add_argument(
        "--repoint",
        action="store_true",
        help="make an environment that has dino_d2 from another checkout use this one",
    )
    args = parser.parse_args(words)
    if (other := other_checkout()) and not args.repoint:
        sys.exit(
            f"{sys.prefix} has dino_d2 installed from {other}, and is left as it is: "
            "use another environment (make VENV=...), or let it use this checkout "
            "(make REPOINT=yes ..., or install.py --repoint)."
        )
    try:
        with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
            install(Path(folder), args.pytorch_index)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run the same command again to continue.")


if __name__ == "__main__":
    main()
