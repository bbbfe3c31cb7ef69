"""`python -m dino_d2.ops` lists the kernels in use, `--build` compiles those for CPUs."""

import argparse
import sys

from . import backends
from .build import FOLDER, LIBRARY, build

parser = argparse.ArgumentParser(prog="python -m dino_d2.ops", description=__doc__)
parser.add_argument("--build", action="store_true", help="compile them, with $CXX or c++")

if parser.parse_args().build:
    if reason := build():
        sys.exit(f"The CPU kernels were not compiled, because {reason}.")
    print(f"Compiled {FOLDER / LIBRARY}; it is used the next time Python starts.")
else:
    for device, kernels, why in backends():
        print(f"{device}: {kernels}" + (f" (nothing faster, because {why})" if why else ""))
