"""Loads and saves a DINO, with the weights of any of its implementations."""

import logging
import os
from glob import escape, glob
from typing import Any, NamedTuple

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts

from ..atomic import replacing
from ..distributed.sharing import gather, scatter
from ..layouts import adapt
from ..layouts.adapt import CLASS_BIAS, LABELS, ClassNames
from ..layouts.backbones import from_timm
from ..layouts.renaming import CheckpointError, State, move
from ..modeling.backbones import TimmBackbone
from ..modeling.dino import DINO
from ..names import plural
from .files import DamagedCheckpoint, fetch, read, weights, write
from .fitting import coco_classes, to_ours
from .settings import EXPECTED, REMEDIES, USUAL_ENCODING, encoding_of, pixels_of, settings

logger = logging.getLogger(__name__)

BEST = "model_best"  # the name of the checkpoint with the best evaluation


class Source(NamedTuple):
    """Where weights come from."""

    file: str
    form: str | None  # as `detect_format` has it
    expected: dict  # the settings of a model that they go with


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, for DINO and for whatever weights there are of it.

    The format of a file is detected, see `layouts/`; what is none of DINO is taken for a
    backbone, as Detectron2 does. The log says how many tensors were loaded, and which were missing,
    unexpected or of another shape. Classes of the same name keep their weights, others start anew.
    What weights expect of the model (see `settings`) is checked, and saved with our own.

    Args:
        model: to load and save
        save_dir: where to save
        classes: names of the model's classes; None: those of COCO if there are 80 or 91, numbers
            otherwise
        complete: whether weights have to fill the model, as for evaluation; resuming a training
            sets it
        checkpointables: what else is saved, and loaded when a training is resumed
    """

    def __init__(
        self,
        model: DINO,
        save_dir: str = "",
        *,
        classes: ClassNames | None = None,
        complete: bool = False,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, **checkpointables)
        number = self.model.num_classes
        self.names = classes or coco_classes(number)
        self.classes = self.names or [f"class {i}" for i in range(number)]
        self.complete = complete

    def save(self, name: str, **kwargs: Any) -> None:
        """The file is complete or not there at all, also if the program ends meanwhile.

        Of a sharded model, every worker has to call this; one writes.
        """
        state = {key: x.state_dict() for key, x in self.checkpointables.items()}
        state = gather({"model": self.model.state_dict(), **state})
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        write({**state, **self.description(), **kwargs}, path)
        if name != BEST:  # kept to be used; a training goes on from where it was last
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def get_checkpoint_file(self) -> str:
        """
        Raises:
            CheckpointError: `last_checkpoint` names no file
        """
        place = os.path.join(self.save_dir, "last_checkpoint")
        with open(place, "rb") as file:
            name = file.read().decode(errors="replace").strip()
        path = os.path.join(self.save_dir, name)
        if not os.path.isfile(path):
            raise CheckpointError(
                f"'{place}' says to resume from {name!r}, which is no file there: write the name "
                "of the checkpoint to resume from into it"
            )
        return path

    def description(self) -> dict:
        """What is saved beside the weights, to be checked by `load`."""
        return {"dino_d2": settings(self.model) | {"classes": self.names and list(self.names)}}

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Loads a training's last checkpoint that is whole, or else the weights at `path`.

        Raises:
            CheckpointError: none of the checkpoints is whole, or does not fit
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
                return self.load(file)
            except DamagedCheckpoint as error:
                logger.warning(f"{error}; the training goes on from the checkpoint before it")
        return self.load(files[-1])

    def has_checkpoint(self) -> bool:
        """Whether there is a training to go on with, also if `last_checkpoint` is lost."""
        return super().has_checkpoint() or bool(self.numbered_files())

    def numbered_files(self) -> list[str]:
        """What a training has saved, the latest first."""
        return sorted(glob(os.path.join(escape(self.save_dir), "model_[0-9]*.pth")), reverse=True)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict:
        """
        Raises:
            CheckpointError: the file cannot be had or is damaged, nothing or (if it has to be
                complete) not all of it fits, or the model has other settings than it needs
        """
        if path:
            fetch(path)
        elif self.complete:
            raise CheckpointError("there is no checkpoint: all of the model would be random")
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # or another file could not be tried after an error

    def _load_file(self, filename: str) -> dict:
        checkpoint = read(filename)
        state, form, note = weights(checkpoint, filename)
        if note:
            logger.info(note)
        expected = checkpoint.get("dino_d2") or EXPECTED.get(form, {}) | encoding_of(filename)
        encoder = self.model.encoder
        encoding = encoder.position_temperature, encoder.position_offset
        usual = USUAL_ENCODING.get(form, encoding)
        if "position_offset" not in expected and encoding != usual:
            logger.warning(
                f"'{filename}' does not say with which encoding of pixels it was trained: the "
                f"model has temperature and offset {encoding}, most of {form} have {usual}"
            )
        # timm's ResNets have torchvision's names, and keep them
        is_timms = form == "torchvision" and isinstance(self.model.backbone, TimmBackbone)
        if form is None or is_timms:
            state = self.to_backbone(state, filename)
        else:
            state = to_ours(state, form)
        return checkpoint | {"model": state, "source": Source(filename, form, expected)}

    def _load_model(self, checkpoint: dict) -> Any:
        source, state = checkpoint.pop("source"), checkpoint.pop("model")
        checkpoint.pop("matching_heuristics", None)  # has been done
        is_dino, new_classes = CLASS_BIAS in state, []
        if is_dino:
            self.check(source)
            state, new_classes = self.fit_classes(self.fit_heads(state, source), source)
        is_ours = "dino_d2" in checkpoint  # other tools have an "ema" of another kind
        if is_ours and "ema" in self.checkpointables and "ema" in checkpoint:
            average = self.fit_heads(checkpoint["ema"]["weights"], source)
            checkpoint["ema"]["weights"], _ = self.fit_classes(average, source)
        state = self.fit_windows(state, self.model.state_dict(), source.file)
        shapes = {key: x.shape for key, x in self.model.state_dict().items()}
        loaded = {key for key, x in state.items() if x.shape == shapes.get(key)}
        state = scatter(state, self.model.state_dict())
        incompatible = super()._load_model(checkpoint | {"model": state})
        # More may be missing than the model says: it sets running statistics silently.
        missing = sorted(shapes.keys() - loaded)
        fits = not is_dino or 2 * len(missing) < len(shapes)
        self.report(incompatible, missing, source, fits)
        if new_classes and fits:
            self.report_new(new_classes, source)
        self.refuse(missing, new_classes, source)
        if not is_dino and "backbone.stem.conv1.weight" in loaded:
            self.check(source._replace(expected=pixels_of(self.model)))
        # What is returned is listed by Detectron2; the names of another model say nothing.
        unfit = incompatible._replace(incorrect_shapes=[])
        return unfit if fits else unfit._replace(missing_keys=[], unexpected_keys=[])

    def to_backbone(self, state: State, file: str) -> State:
        """Names that nobody knows are matched with those of the backbone, as Detectron2 does."""
        caffe2 = any(key.endswith("_w") for key in state)
        backbone = {k: x for k, x in self.model.state_dict().items() if k.startswith("backbone.")}
        if isinstance(self.model.backbone, TimmBackbone):
            return from_timm(state, backbone)
        # before they are matched: what is of another shape is left out
        initial = move(backbone, "backbone.", "")
        state = self.fit_windows(state, initial, file)
        try:
            return align_and_update_state_dicts(backbone, state, c2_conversion=caffe2)
        except ValueError:  # a name is the end of several: it says nothing
            return state

    def fit_windows(self, state: State, initial: State, file: str) -> State:
        """Position biases for the windows of the model's Swin transformer: interpolated ones are a
        good start, but not what was trained.

        Raises:
            CheckpointError: some would be interpolated, but the weights have to be complete
        """
        state, windows = adapt.resize_windows(state, initial)
        if windows:
            before, now = next(iter(windows.values()))
            message = (
                f"the Swin transformer of '{file}' has windows of {before} x {before}, that of the "
                f"model has {now} x {now}"
            )
            if self.complete:
                raise CheckpointError(
                    f"{message}: set model.backbone.window_size to {before}, or fine-tune from them"
                )
            logger.warning(f"{message}: {len(windows)} position biases are interpolated")
        return state

    def check(self, source: Source) -> None:
        """Compares the settings of model and weights. A wrong encoding of pixels is always an
        error; other pixels may be meant to be learned, but not for evaluation."""
        for name, found in settings(self.model).items():
            value = source.expected.get(name, found)
            exact = name.startswith("position")
            if np.allclose(found, value, rtol=1e-3 if exact else 0.05):
                continue
            message = (
                f"the weights of '{source.file}' go with {name} {value}, but the model has "
                f"{found}: change {REMEDIES[name]}"
            )
            if self.complete or exact:
                raise CheckpointError(message)
            logger.warning(message)

    def fit_heads(self, state: State, source: Source) -> State:
        """One head for all layers is as good as the same for every one, but not the reverse."""
        given, wanted = adapt.count_heads(state), len(self.model.decoder.class_heads)
        if given == 1:
            return adapt.repeat_heads(state, wanted)
        if wanted == 1:
            raise CheckpointError(
                f"'{source.file}' has heads for each of {given} decoder layers, but those of "
                "the model are shared: set MODEL.DINO.SHARED_HEADS "
                "(model.decoder.shared_heads) to False"
            )
        return state

    def fit_classes(self, state: State, source: Source) -> tuple[State, list[str]]:
        """Rows for the model's classes, and those of them that are new."""
        number = len(state[CLASS_BIAS])
        rows = len(state.get(LABELS, range(number + 1))) - 1
        if rows != number:
            logger.info(
                f"the label embedding of '{source.file}' is for {plural(rows, 'class')} and its "
                f"class heads for {number}: these are kept, and of the embedding the rows of their "
                "classes" + (", of which others start anew" if rows < number else "")
            )
        given = source.expected.get("classes") or coco_classes(number)
        if given is None and self.names and number == self.model.num_classes:
            logger.warning(
                f"'{source.file}' does not name its classes: they are taken to be, in this order, "
                + ", ".join(self.classes)
            )
        return adapt.select_classes(state, given, self.classes, gather(self.model.state_dict()))

    def report(self, incompatible: Any, missing: list[str], source: Source, fits: bool) -> None:
        """In one sentence, a warning where the config may be another than that of the weights."""
        _, unexpected, other_shape = incompatible
        total = len(self.model.state_dict())
        message = (
            f"{total - len(missing)} of {total} tensors are from '{source.file}' "
            f"({source.form or 'a backbone'}), {len(missing)} keep their initial values, "
            f"{len(unexpected)} were not expected, {len(other_shape)} have another shape"
        )
        if other_shape:
            key, given, wanted = other_shape[0]
            message += f", such as {key}: {given} in the file, {wanted} in the model"
        if not fits:
            message += (
                "; the weights are of another model than the config: take the config that they "
                "were trained with or, to train this one, weights of its backbone"
            )
        logger.log(logging.INFO if fits and not other_shape else logging.WARNING, message)

    def report_new(self, classes: list[str], source: Source) -> None:
        logger.warning(
            f"{len(classes)} of {len(self.classes)} classes are new to '{source.file}' and "
            f"start anew in the class heads and the label embedding: {', '.join(classes)}"
        )

    def refuse(self, missing: list[str], new_classes: list[str], source: Source) -> None:
        """
        Raises:
            CheckpointError: nothing was loaded, or less than has to be
        """
        if len(missing) == len(self.model.state_dict()):
            raise CheckpointError(
                f"no tensor of '{source.file}' fits: it is of another model, or the config is"
            )
        left = [
            key
            for key in missing
            if not key.startswith("denoising.") and not key.endswith(".num_batches_tracked")
        ]
        if self.complete and (new_classes or left):
            what = f"the class {new_classes[0]}" if new_classes else f"tensors such as {left[0]}"
            raise CheckpointError(
                f"'{source.file}' does not fill the model: {what} would be random; the config has "
                "to be that of the weights, and the classes have to be among theirs"
            )
