"""Configs and published checkpoints by name, like `detectron2.model_zoo`."""

import os
from pathlib import Path

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig

from ..config import styles
from ..config.styles import keys_for, put, read_config
from ..layouts.renaming import CheckpointError
from ..modeling.detector import Detector
from ..names import check_device, hint, nearest_path
from .checkpointer import Checkpointer
from .download import fetch
from .files import ReleaseHandler
from .fitting import open_weights
from .releases import RELEASES, alternatives, find

# Inside the package where it is installed, beside it in a checkout.
_PLACES = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
NUM_CLASSES = 80  # of COCO, on which nearly all published checkpoints were trained


def get_config_file(name: str) -> str:
    """The path of a config such as "dino_R_50_4scale_12ep.py", or of a published checkpoint's
    config.

    Args:
        name: relative to `configs/`; without a suffix, YAML is preferred. Existing files (~ is the
            home folder) and URLs are returned as they are

    Raises:
        FileNotFoundError: no such config; suggests the nearest
    """
    if _is_file(given := os.path.expanduser(name)):
        return given
    config = RELEASES[name].config if name in RELEASES else name
    root = next(place for place in _PLACES if place.is_dir())
    suffixes = [""] if config.endswith((".yaml", ".py")) else [".yaml", ".py"]
    for path in (root / f"{config}{suffix}" for suffix in suffixes):
        if path.is_file():
            return str(path)
    files = (x.relative_to(root) for x in root.rglob("*") if x.suffix in (".yaml", ".py"))
    names = sorted({str(x.with_suffix("")) for x in files}, key=lambda x: ("/" in x, x))
    file = nearest_path(name)
    end = f"did you mean: {file}" if os.path.isfile(file) else hint(name, [*names, *RELEASES])
    raise FileNotFoundError(f"there is no config {name!r}; {end}")


def _is_file(name: str) -> bool:
    return "://" in name or os.path.isfile(name)


def get_config(name: str, trained: bool = False) -> CfgNode | DictConfig:
    """A config by name: a CfgNode for YAML, an omegaconf DictConfig for LazyConfig (`.py`).

    Args:
        name: as of `get_config_file`
        trained: use the weights of the published checkpoint `name`, with the number of its
            classes, in place of ImageNet weights for training; they need our `Checkpointer`. Files
            keep their own

    Raises:
        FileNotFoundError: no such config, or no such published checkpoint
    """
    cfg = read_config(get_config_file(name))
    trained = trained and not _is_file(os.path.expanduser(name))
    if trained:
        put(cfg, keys_for(cfg).weights, f"dino_d2://{find(name).name}")
        put(cfg, keys_for(cfg).num_classes, find(name).num_classes)
    return cfg


def get(name: str, device: str | None = None) -> Detector:
    """Load a published checkpoint for inference: `model_zoo.get("detrex/dino_...")`.

    Args:
        name: of a published checkpoint, see `releases.find`; downloaded once, into Detectron2's
            cache
        device: default: the GPU if there is one

    Raises:
        FileNotFoundError: no such published checkpoint
        CheckpointError: it cannot be downloaded
    """
    cfg = get_config(name, trained=True)
    model = build(cfg, find(name).num_classes, device)
    Checkpointer(model, complete=True).load(open_weights(weights_of(cfg), mmap=True))
    return model.eval()


def build(cfg: CfgNode | DictConfig, num_classes: int, device: str | None = None) -> Detector:
    """Build the model of a config of either style.

    Args:
        cfg: its device is ignored
        num_classes: K
        device: default: the GPU if there is one

    Raises:
        ValueError: there is no such device, or the config is of another model
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    put(cfg, keys_for(cfg).num_classes, num_classes)
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device
        model = build_model(cfg)
    else:
        model = instantiate(cfg.model).to(device)
    if not isinstance(model, Detector):
        raise ValueError(f"the config is that of a {type(model).__name__}, not of a DINO")
    return model


def weights_of(cfg: CfgNode | DictConfig) -> str:
    """The weights that a config of either style names."""
    return styles.get(cfg, keys_for(cfg).weights)


def fetch_weights(path: str) -> str:
    """The local path of weights; if they are unavailable, a CheckpointError with others."""
    try:
        return fetch(path)
    except CheckpointError as error:
        prefix = ReleaseHandler.PREFIX
        near = [f"{prefix}{x}" for x in alternatives(path.removeprefix(prefix))]
        near = near if "://" in path else [nearest_path(path)]
        if not any(near):
            raise
        raise CheckpointError(f"{error}; available instead: {', '.join(near)}") from error
