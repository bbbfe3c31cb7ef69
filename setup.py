import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

OPS = "dino_d2/ops"

# What only some programs need; they say so when it is missing.
EXTRAS = {
    "export": ["onnx", "onnxscript", "onnxruntime"],
    "slurm": ["submitit"],
    "timm": ["timm"],
    "video": ["opencv-python"],
    "wandb": ["wandb"],
}


class BuildKernels(build_ext):
    """Compiles the CPU kernels if it can; never fails, and leaves a note in their place."""

    def run(self):
        folder = Path(OPS) if self.inplace else Path(self.build_lib, OPS)
        reason = runpy.run_path(f"{OPS}/build.py")["build"](folder)
        if reason:
            print(f"dino_d2 is installed without compiled CPU kernels, because {reason}")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    name="dino_d2",
    version="0.1.0",
    description="DINO (DETR with Improved DeNoising Anchor Boxes) for Detectron2",
    license="Apache-2.0",
    python_requires=">=3.10",
    # Detectron2 is needed too, but it cannot be named here: PyPI has no `detectron2`, and a Git URL
    # would replace the build that a user has. See the README, or let `make` bring one.
    # No upper bounds for the same reason: installing this package never changes a working PyTorch.
    install_requires=[
        "torch>=2.10",
        "torchvision",
        "fvcore",
        "matplotlib",
        "numpy",
        "omegaconf",
        "Pillow",
        "pycocotools",
        "scipy",
        "tqdm",
    ],
    extras_require=EXTRAS
    | {
        # Without windows: the tests run where there is no display.
        "dev": [
            *("pytest", "pytest-cov", "pytest-xdist", "mypy", "ruff", "opencv-python-headless"),
            *(name for key, names in EXTRAS.items() if key != "video" for name in names),
        ],
    },
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
    cmdclass={"build_ext": BuildKernels},
)
