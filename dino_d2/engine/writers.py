"""Sends the metrics of a run to Weights & Biases."""

import importlib.util
import logging
import os
import sys
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage
from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)


class WandbWriter(EventWriter):
    """Sends scalars to Weights & Biases, smoothed like those in `metrics.json`.

    W&B's environment variables, such as WANDB_MODE (offline), WANDB_NAME and WANDB_ENTITY, apply.
    It uploads and retries in a separate process, from the folder `wandb` of the output folder, so
    training never waits for the network (except at its end, for WANDB_FINISH_TIMEOUT seconds).

    Args:
        project: of W&B
        output_dir: of the training; stores the id of the run
        config: of the training, see `plain_config`
        resume: continue the run of the output folder, if there is one
        window_size: iterations to take the median over
    """

    def __init__(
        self,
        project: str,
        output_dir: str,
        *,
        config: dict[str, Any],
        resume: bool,
        window_size: int = 20,
    ):
        self.window_size = window_size
        self.last = -1  # last iteration that was sent
        self.run = start_run(project, output_dir, config, resume)

    def write(self) -> None:
        scalars = get_event_storage().latest_with_smoothing_hint(self.window_size)
        new: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in scalars.items():
            if iteration > self.last:
                new[iteration][name] = value
        for iteration in sorted(new):
            self.call_run("log", new[iteration], step=iteration)
        self.last = max(new, default=self.last)

    def close(self) -> None:
        """Finish the run, as failed if an error ended training."""
        self.call_run("finish", exit_code=int(sys.exc_info()[0] is not None))

    def call_run(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of the run; if W&B's process has died, training continues without it."""
        if self.run is None:
            return
        try:
            getattr(self.run, name)(*args, **kwargs)
        except OSError as error:
            self.run = None
            logger.warning(
                f"Weights & Biases has stopped ({error}): training continues without it, and "
                "metrics.json has all numbers"
            )


def start_run(project: str, output_dir: str, config: dict[str, Any], resume: bool) -> Any:
    """Start the W&B run, offline if W&B cannot be reached."""
    import wandb  # optional

    memory = Path(output_dir, "wandb_id")
    if not (resume and memory.is_file()):
        memory.write_text(uuid.uuid4().hex)
    options = {
        "project": project,
        "name": os.environ.get("WANDB_NAME", Path(output_dir).absolute().name),
        "id": memory.read_text().strip(),
        "resume": "allow",
        "dir": output_dir,
        "config": config,
    }
    try:
        return wandb.init(**options)
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        logger.warning(
            f"Weights & Biases cannot be reached ({reason}): the run is written to "
            f"'{output_dir}/wandb', upload it later with `wandb sync`"
        )
        return wandb.init(**options, mode="offline")


def require_wandb() -> None:
    """Raise a ValueError if wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "a project of Weights & Biases is named, but wandb is not installed: "
            "`pip install wandb`, or leave WANDB.PROJECT (train.wandb_project) empty"
        )


def plain_config(config: Any) -> Any:
    """Convert a config of either style to dicts, lists, numbers and strings.

    >>> plain_config({"optimizer": {"_target_": EventWriter, "betas": (0.9, 0.999)}})
    {'optimizer': {'_target_': 'EventWriter', 'betas': [0.9, 0.999]}}
    """
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=False)
    if isinstance(config, Mapping):
        return {str(key): plain_config(value) for key, value in config.items()}
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [plain_config(value) for value in config]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    return getattr(config, "__qualname__", None) or str(config)
