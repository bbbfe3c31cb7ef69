"""What pyproject.toml cannot say: the CPU kernels, which are compiled where there is a compiler."""

import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

OPS = "dino_d2/ops"


class BuildKernels(build_ext):
    """Compiles the CPU kernels if it can; never fails, and leaves a note in their place."""

    def run(self):
        folder = Path(OPS) if self.inplace else Path(self.build_lib, OPS)
        builder = runpy.run_path(f"{OPS}/build.py")
        reason = builder["build"](folder)
        if reason and not self.inplace:  # a wheel may be installed on another machine
            (folder / builder["REASON"]).write_text(f"where it was built, {reason}")
        if reason:
            print(f"dino_d2 is installed without compiled CPU kernels, because {reason}")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class TaggedWheel(bdist_wheel):
    """A wheel for any Python; for a platform if kernels were compiled, otherwise for all of them.

    The kernels use PyTorch's stable ABI, and nothing of Python's.
    """

    def get_tag(self):
        folder = Path(self.get_finalized_command("build").build_lib, OPS)
        compiled = list(folder.glob("*.so"))
        return "py3", "none", super().get_tag()[2] if compiled else "any"


setup(
    # configs/ stays at the top, where Detectron2 users look for it, and is installed as
    # dino_d2/configs, where dino_d2.model_zoo finds it.
    packages=[*find_packages(include=["dino_d2*"]), "dino_d2.configs"],
    package_dir={"dino_d2.configs": "configs"},
    package_data={
        "dino_d2": ["py.typed"],
        "dino_d2.configs": ["**/*.yaml", "**/*.py"],
        "dino_d2.ops": ["csrc/*"],
    },
    # What is in it is up to BuildKernels: the name only tells setuptools that there is something.
    ext_modules=[Extension("dino_d2.ops.ms_deform_attn_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TaggedWheel},
)
