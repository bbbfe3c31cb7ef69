"""Loads and saves a detector, with the weights of any implementation of DINO."""

import logging
import os
from glob import escape, glob
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from ..atomic import replacing
from ..distributed.sharing import gather, scatter
from ..layouts.adapt import TRAINING_ONLY, ClassNames
from ..layouts.renaming import CheckpointError, State
from ..modeling.detector import Detector
from .files import DamagedCheckpoint, write
from .fitting import (
    OpenedWeights,
    fit_classes,
    fit_heads,
    fit_names,
    fit_windows,
    known_classes,
    leave_training_only,
    open_weights,
)
from .report import report_loaded, report_new_classes, require_loaded
from .settings import check_settings, pixels_of, warn_of_encoding

logger = logging.getLogger(__name__)

BEST = "model_best"  # the name of the checkpoint with the best evaluation


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, for DINO and weights of any of its implementations.

    The format of a file is detected, see `layouts/`; unknown ones are read as a backbone, as by
    Detectron2. The log says how many tensors were loaded, missing, unexpected or of another shape.
    Classes of the same name keep their weights, others are initialised. The settings that weights
    need (see `Detector.settings`) are checked, and saved with our own.

    Args:
        model: to load and save
        save_dir: where to save
        classes: names of the model's classes; None: those of COCO if there are 80 or 91, of
            Objects365 if there are 365 or 366, numbers otherwise
        complete: weights have to fill the model, as for evaluation and resuming
        checkpointables: what else to save, and to load on a resume
    """

    def __init__(
        self,
        model: Detector,
        save_dir: str = "",
        *,
        classes: ClassNames | None = None,
        complete: bool = False,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, **checkpointables)
        number = self.model.num_classes
        self.names = classes or known_classes(number)
        self.classes = self.names or [f"class {i}" for i in range(number)]
        self.complete = complete
        self.thresholds: tuple[int, dict] = -1, {}  # of the weights of an iteration
        self.saved: dict[str, dict[str, Any]] = {}  # by name, what the last ones were saved with
        self.opened: OpenedWeights | None = None  # while it is loaded

    def save(self, name: str, **kwargs: Any) -> None:
        """Save atomically; collective for a sharded model, where one worker writes."""
        if name != BEST:
            same = {
                k: x for k, x in self.saved.items() if x.get("iteration") == kwargs.get("iteration")
            }
            self.saved = same | {name: kwargs}
        state = {key: x.state_dict() for key, x in self.checkpointables.items()}
        state = gather({"model": self.model.state_dict(), **state})
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        write({**state, **self.description(kwargs.get("iteration")), **kwargs}, path)
        if name != BEST:  # kept, as resuming uses the latest one
            self.tag_last_checkpoint(os.path.basename(path))

    def add_thresholds(self, iteration: int, thresholds: dict[str, dict[str, float]]) -> None:
        """Save checkpoints of an iteration, if they were the last, once more with thresholds.

        Args:
            thresholds: by class under "thresholds" and "ema_thresholds", see `ThresholdSaver`
        """
        self.thresholds = iteration, thresholds
        for name, kwargs in self.saved.items():
            if thresholds and kwargs.get("iteration") == iteration:
                self.save(name, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def get_checkpoint_file(self) -> str:
        """The path in `last_checkpoint`; a CheckpointError if it names no file."""
        place = os.path.join(self.save_dir, "last_checkpoint")
        with open(place, "rb") as file:
            name = file.read().decode(errors="replace").strip()
        path = os.path.join(self.save_dir, name)
        if not os.path.isfile(path):
            raise CheckpointError(
                f"'{place}' says to resume from {name!r}, which is not a file there: write the "
                "name of the checkpoint to resume from into it"
            )
        return path

    def description(self, iteration: int | None = None) -> dict:
        """What is saved with weights: to be checked by `load`, and for the predictor."""
        classes = {"classes": self.names and list(self.names)}
        evaluated, thresholds = self.thresholds
        thresholds = thresholds if iteration == evaluated else {}
        return {"dino_d2": self.model.settings() | classes | thresholds}

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Load the last intact checkpoint of a run, or else the weights at `path`.

        Raises:
            CheckpointError: no checkpoint is intact, or it does not fit
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        self.complete = True
        files = self.numbered_files()
        if super().has_checkpoint():
            last = self.get_checkpoint_file()
            files = [last, *(file for file in files if file != last)]
        for file in files[:-1]:
            try:
                return self.load_to_resume(file)
            except DamagedCheckpoint as error:
                logger.warning(f"{error}; training resumes from the checkpoint before it")
        return self.load_to_resume(files[-1])

    def load_to_resume(self, file: str) -> dict:
        """Load a checkpoint of this run, which is then its last one."""
        rest = self.load(file)
        kept = {key: rest[key] for key in ("iteration",) if key in rest}
        self.saved = {os.path.splitext(os.path.basename(file))[0]: kept}
        return rest

    def has_checkpoint(self) -> bool:
        """Whether there is a run to resume, even without `last_checkpoint`."""
        return super().has_checkpoint() or bool(self.numbered_files())

    def numbered_files(self) -> list[str]:
        """The checkpoints of a run, the latest first."""
        return sorted(glob(os.path.join(escape(self.save_dir), "model_[0-9]*.pth")), reverse=True)

    def load(self, path: str | OpenedWeights, *args: Any, **kwargs: Any) -> dict:
        """Load weights of any format, and report how they fit.

        Args:
            path: as of `open_weights`, or its result; "": nothing is loaded

        Raises:
            CheckpointError: the file is missing or damaged, nothing or (if `complete`) not all of
                it fits, or the weights need other settings of the model
        """
        if not path and self.complete:
            raise CheckpointError("there is no checkpoint: the whole model would be random")
        if path:
            self.opened = path if isinstance(path, OpenedWeights) else open_weights(path)
        try:
            return super().load(self.opened.file if self.opened else "", *args, **kwargs)
        finally:
            self.opened = None
            self._parsed_url_during_load = None  # so that another file can be tried after an error

    def _load_file(self, filename: str) -> dict:
        opened = self.opened
        assert opened is not None
        if opened.note:
            logger.info(opened.note)
        warn_of_encoding(self.model, opened.form, opened.settings, opened.file)
        state = fit_names(opened, self.model, complete=self.complete)
        return opened.rest | {"model": state, "opened": opened}

    def _load_model(self, checkpoint: dict) -> Any:
        opened: OpenedWeights = checkpoint.pop("opened")
        state = checkpoint.pop("model")
        checkpoint.pop("matching_heuristics", None)  # has been done
        own = self.model.state_dict()
        new_classes: list[str] = []
        if is_detector := self.model.count_classes(state) is not None:
            check_settings(self.model, opened.settings, opened.file, complete=self.complete)
            state, new_classes = self.fit(state, opened)
        is_ours = "dino_d2" in checkpoint  # "ema" of other tools has another format
        if is_ours and "ema" in self.checkpointables and "ema" in checkpoint:
            average, _ = self.fit(checkpoint["ema"]["weights"], opened)
            only = {k: x for k, x in own.items() if k.startswith(TRAINING_ONLY)}
            average = gather(only) | average
            checkpoint["ema"] = checkpoint["ema"] | {"weights": average}
        state = leave_training_only(state, own, opened.file)
        state = fit_windows(state, own, opened.file, complete=self.complete)
        loaded = {key for key, x in state.items() if key in own and x.shape == own[key].shape}
        incompatible = super()._load_model(checkpoint | {"model": scatter(state, own)})
        # The model does not report missing running statistics.
        missing = sorted(own.keys() - loaded)
        fits = not is_detector or 2 * len(missing) < len(own)
        report_loaded(opened, incompatible, missing, len(own), fits=fits)
        if new_classes and fits:
            report_new_classes(opened, new_classes, len(self.classes))
        require_loaded(opened, missing, new_classes, len(own), complete=self.complete)
        if not is_detector and "backbone.stem.conv1.weight" in loaded:
            pixels = pixels_of(self.model)
            check_settings(self.model, pixels, opened.file, complete=self.complete)
        # Detectron2 lists what is returned; names of another model would not help.
        unfit = incompatible._replace(incorrect_shapes=[])
        if self.complete:  # nothing that is missing is needed
            unfit = unfit._replace(missing_keys=[])
        return unfit if fits else unfit._replace(missing_keys=[], unexpected_keys=[])

    def fit(self, state: State, opened: OpenedWeights) -> tuple[State, list[str]]:
        """Fit weights to the model's heads and classes; also returns classes without weights."""
        state = fit_heads(state, self.model, opened.file)
        return fit_classes(state, opened, self.model, self.classes, named=bool(self.names))
