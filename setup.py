from setuptools import find_packages, setup

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
    extras_require={"dev": ["pytest", "pytest-cov", "ruff"]},
    # configs/ stays at the top, where Detectron2 users look for it, and is installed as
    # dino_d2/configs, where dino_d2.model_zoo finds it.
    packages=[*find_packages(include=["dino_d2*"]), "dino_d2.configs"],
    package_dir={"dino_d2.configs": "configs"},
    package_data={"dino_d2.configs": ["**/*.yaml", "**/*.py"]},
)
