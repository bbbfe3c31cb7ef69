"""Scales learning rate and schedule length to the batch size and the data."""

import math
from collections.abc import Collection

from detectron2.config import CfgNode, instantiate
from detectron2.data import get_detection_dataset_dicts
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    ParamScheduler,
)
from omegaconf import DictConfig

from ..config.styles import Keys, get, keys_for, put
from ..ranges import require_positive, require_share, require_whole

LONGEST_WARM_UP = 0.05  # fraction of the run, as in Goyal et al.: 5 of 90 epochs


def scale_schedule(cfg: CfgNode | DictConfig, given: Collection[str] = ()) -> None:
    """Scale learning rate and numbers of iterations, in place, to the batch and the data.

    For a reference batch R of the config and a batch B, the learning rate is multiplied by B / R
    and numbers of iterations by R / B, so that the same number of images is seen (the linear rule
    of `SOLVER.REFERENCE_WORLD_SIZE`; Goyal et al., 2017). With a length in epochs, other numbers
    are scaled in proportion. Warm-up keeps its image count, capped at 5 % of the run or its
    original share, whichever is larger.

    Args:
        cfg: of either style
        given: keys to leave as they are, such as those of the command line

    Raises:
        ValueError: the length is given both in epochs and in iterations, or the learning rate or a
            number of images per step, epochs or iterations is invalid
    """
    keys = keys_for(cfg)
    batch, reference, epochs, max_iter = (
        get(cfg, key) for key in (keys.batch, keys.reference_batch, keys.epochs, keys.max_iter)
    )
    for key, value, kinds in ((keys.batch, batch, int), (keys.epochs, epochs, (int, float))):
        if value is not None and not (isinstance(value, kinds) and value > 0):
            raise ValueError(f"{key} is {value!r}; it has to be a number above 0")
    check_numbers(cfg, keys)
    if epochs and not math.isfinite(epochs):
        raise ValueError(f"{keys.epochs} is {epochs}: give a finite number of epochs")
    if epochs and keys.max_iter in given:
        raise ValueError(f"the length is given as {keys.epochs} and as {keys.max_iter}: drop one")
    per_image = batch / reference if reference else 1.0
    longer = epochs * count_images(cfg) / batch / max_iter if epochs else 1 / per_image
    factors = dict.fromkeys((keys.max_iter, *keys.iterations), longer) | {keys.lr: per_image}
    if warm_up := get(cfg, keys.warm_up, 0):
        longest = LONGEST_WARM_UP * longer * max_iter / warm_up
        factors[keys.warm_up] = min(1 / per_image, max(longer, longest))
    for key, factor in factors.items():
        if key not in given:
            put(cfg, key, scaled(get(cfg, key), factor))
    put(cfg, keys.reference_batch, batch)  # so that a saved config is not scaled again
    put(cfg, keys.epochs, None)


def check_numbers(cfg: CfgNode | DictConfig, keys: Keys) -> None:
    """Raise a ValueError if the learning rate or a number of iterations is invalid."""
    require_positive(**{keys.lr: get(cfg, keys.lr)})
    require_whole(**{keys.max_iter: get(cfg, keys.max_iter)})
    for key in keys.iterations:  # 0: never, or only at the end
        value = get(cfg, key)
        for number in value if isinstance(value, tuple) else [value]:
            require_whole(0, **{key: number})


def scaled(value: float | int | tuple, factor: float) -> float | int | tuple:
    """Scale a number of iterations to an integer; one above 0 stays at least 1."""
    if isinstance(value, tuple):
        return tuple(scaled(x, factor) for x in value)
    if isinstance(value, int):
        return max(round(value * factor), min(value, 1))
    return value * factor


def count_images(cfg: CfgNode | DictConfig) -> int:
    """The number of training images that the loader has."""
    if isinstance(cfg, DictConfig):
        return len(instantiate(cfg.dataloader.train.dataset))
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    return len(get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=filter_empty))


def flat_cosine(flat: float = 0.5, end: float = 0.0) -> ParamScheduler:
    """A factor of the learning rate: 1 for part of the run, then cosine decay.

    >>> schedule = flat_cosine(flat=0.5)
    >>> [round(schedule(where), 6) for where in (0, 0.25, 0.5, 0.75)]
    [1.0, 1.0, 1.0, 0.5]

    Args:
        flat: fraction of the run, in [0, 1]
        end: the factor at its end, in [0, 1]

    Raises:
        ValueError: a number is out of range
    """
    require_share(**{"flat (SOLVER.FLAT_SHARE)": flat, "end (SOLVER.BASE_LR_END / BASE_LR)": end})
    falling, parts = CosineParamScheduler(1.0, end), ["fixed", "rescaled"]
    if flat in (0, 1):
        return ConstantParamScheduler(1.0) if flat else falling
    return CompositeParamScheduler(
        [ConstantParamScheduler(1.0), falling], lengths=[flat, 1 - flat], interval_scaling=parts
    )


def share_of(iterations: int, max_iter: int) -> float:
    """A number of iterations as a fraction of the run, at most 1.

    For the schedulers of a LazyConfig, which count in shares; as `SOLVER.WARMUP_ITERS` in YAML.
    """
    return min(iterations / max_iter, 1.0)
