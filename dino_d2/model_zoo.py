"""The configs of this project by name, as `detectron2.model_zoo` has those of Detectron2."""

from difflib import get_close_matches
from pathlib import Path

from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import DictConfig

from .config import add_dino_config

# Inside the package where it is installed, beside it in a checkout.
_PLACES = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")


def get_config_file(name: str) -> str:
    """Path of a config such as "dino_R_50_4scale_12ep.py".

    Args:
        name: relative to `configs/`; without a suffix the YAML twin is meant

    Raises:
        FileNotFoundError: no such config; names the nearest
    """
    root = next(place for place in _PLACES if place.is_dir())
    path = root / (name if name.endswith((".yaml", ".py")) else f"{name}.yaml")
    if not path.is_file():
        names = [str(x.relative_to(root)) for x in root.rglob("*") if x.suffix in (".yaml", ".py")]
        nearest = ", ".join(get_close_matches(path.name, names)) or ", ".join(sorted(names))
        raise FileNotFoundError(f"there is no config {name!r}; the nearest: {nearest}")
    return str(path)


def get_config(name: str) -> CfgNode | DictConfig:
    """A config by name: a CfgNode for YAML, an omegaconf DictConfig for LazyConfig (`.py`)."""
    file = get_config_file(name)
    if file.endswith(".py"):
        return LazyConfig.load(file)
    cfg = get_cfg()
    add_dino_config(cfg)
    cfg.merge_from_file(file)
    return cfg
