"""Compiles the CPU kernels, when dino_d2 is installed or by `python -m dino_d2.ops --build`.

They are optional: an installation without a compiler works too, but slower. setup.py runs this
file on its own, so it imports only the standard library.
"""

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Part of the file name, so that a library of older sources is not loaded.
VERSION = hashlib.sha256(b"".join(x.read_bytes() for x in sorted(FOLDER.glob("csrc/*"))))
LIBRARY = f"ms_deform_attn_cpu.{VERSION.hexdigest()[:8]}.so"
REASON = "ms_deform_attn_cpu.txt"  # says why there is no library

X86 = platform.machine().lower() in ("x86_64", "amd64")
# Per instruction set: floats per vector, compiler options. All are compiled, and one is chosen at
# run time.
INSTRUCTION_SETS: dict[str, tuple[int, list[str]]] = {"baseline": (4, [])}
if X86:
    INSTRUCTION_SETS["avx2"] = 8, ["-mavx2", "-mfma"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
    INSTRUCTION_SETS["avx512"] = 16, avx512

OPTIONS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd"),
    *("-fno-math-errno", "-fno-trapping-math"),
    # PyTorch's stable ABI as of 2.10, the first with everything that we use
    "-DTORCH_TARGET_VERSION=0x020A000000000000",
    *(["-DX86"] if X86 else []),
]


def build(folder: Path = FOLDER) -> str:
    """Compile the library into `folder`; returns why that failed, or "".

    The reason is also written into the folder, for `compiled.load_library`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("ms_deform_attn_cpu.*.so"), folder / REASON]:
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        reason = compile_library(Path(scratch))
        if not reason:
            shutil.copy(Path(scratch, LIBRARY), folder)
    if reason:
        (folder / REASON).write_text(reason)
    return reason


def compile_library(scratch: Path) -> str:
    """Compile in a temporary folder; returns why that failed, or ""."""
    if sys.platform == "win32":
        return "the kernels are written for GCC and Clang"
    torch = find_torch()
    if torch is None:
        return "PyTorch was not installed when dino_d2 was"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        return f"there is no C++ compiler called {compiler[0]}"

    compile_, csrc = [*compiler, *OPTIONS, "-c"], FOLDER / "csrc"
    commands = [
        [*compile_, f"-DISA={name}", f"-DLANES={lanes}", *options]
        + [str(csrc / "kernels.cpp"), "-o", f"{name}.o"]
        for name, (lanes, options) in INSTRUCTION_SETS.items()
    ]
    include = f"-I{torch / 'include'}"
    commands.append([*compile_, include, str(csrc / "operators.cpp"), "-o", "operators.o"])
    objects = [command[-1] for command in commands]
    # No rpath: PyTorch's own library is always loaded first.
    link = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
    commands.append([*compiler, "-shared", *objects, *link, "-o", LIBRARY])
    for command in commands:
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        if result.returncode:
            error = (result.stderr.strip().splitlines() or ["no message"])[0]
            return f"compiling failed ({shlex.join(command[:1])}: {error})"
    return ""


def find_torch() -> Path | None:
    """The folder of the installed PyTorch, which pip's isolated builds cannot import."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    folder = Path(sysconfig.get_path("platlib"), "torch")
    return folder if (folder / "include").exists() else None
