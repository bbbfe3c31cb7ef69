"""Detection in one call: `dino_d2.load(...)(image)`. Exported files need no Detectron2 for it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .detectron import INSTALLED, MISSING, Instances
from .images import WRONG_CHANNELS, channels_of, check_mode, read_image, to_array
from .names import check_device, hint, plural
from .ranges import require_share
from .weights.download import fetch

if TYPE_CHECKING:
    from detectron2.data import transforms as T

    from .export import ExportedModel
    from .modeling.detector import Detector

Picture = str | os.PathLike | Image.Image | np.ndarray
EXPORTED = (".onnx", ".pt2")
Thresholds = float | Mapping[str, float] | None
DTYPES = torch.float32, torch.bfloat16, torch.float16


class Predictor:
    """Detects in images of any kind.

    Args:
        model: in evaluation mode, or an exported one
        classes: names of its classes
        augmentations: resize an image as in evaluation
        image_format: of the model: "RGB", "BGR", "L" (grey values)
        thresholds: score thresholds by class name; 0 for classes without one
        dtype: of autocast; bfloat16 more than doubles the speed of hardware that supports it, and
            changes scores slightly

    Raises:
        ValueError: the dtype is not one of `DTYPES`, the format is unknown or not the model's, or a
            threshold is of no class or not in [0, 1]
    """

    def __init__(
        self,
        model: "Detector | ExportedModel",
        *,
        classes: Sequence[str],
        augmentations: Sequence["T.Augmentation"],
        image_format: str,
        thresholds: Mapping[str, float] = MappingProxyType({}),
        dtype: torch.dtype = torch.float32,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: give {', '.join(map(str, DTYPES))}")
        channels, wanted = channels_of(image_format), len(model.pixel_mean)
        if channels != wanted:
            raise ValueError(WRONG_CHANNELS.format(plural(channels, "channel"), wanted))
        self.model, self.classes = model, list(classes)
        self.augmentations = list(augmentations)
        self.image_format, self.dtype = image_format, dtype
        for name in thresholds:
            if name not in self.classes:
                raise ValueError(f"there is a threshold for {name!r}; {hint(name, self.classes)}")
        require_share(**{f"the threshold of {name}": x for name, x in thresholds.items()})
        self.thresholds = dict(thresholds)
        self.highest = 0.0  # score that any detection has had, whatever the thresholds

    def __call__(
        self, images: Picture | list | tuple, threshold: float | None = None
    ) -> Instances | list[Instances]:
        """Detect in one image or a list of images.

        Args:
            images: paths, PIL images (their EXIF orientation is ignored) or uint8 arrays, RGB (H,
                W, 3) or grey (H, W); or one of these. They are converted to the model's format, and
                transparency is dropped
            threshold: score threshold for all classes, in place of `thresholds`

        Returns:
            for each image, pred_boxes in pixels, scores in descending order and from the threshold
            of the class on, pred_classes and, of Mask DINO, pred_masks (n, height, width) bool

        Raises:
            ValueError: the input is none of these, the threshold is not in [0, 1], or the model
                does not output instances
            DatasetError: a file cannot be read, or an image has more than 8 bits per channel
        """
        if not self.gives_instances:
            raise ValueError(
                "this model outputs maps and no instances: call results(image) of the predictor, "
                "or set MODEL.DINO.TEST.INSTANCE_ON (model.instance_on) to True"
            )
        if isinstance(images, list | tuple):
            return [x["instances"] for x in self.run(images, threshold)]
        return self([images], threshold)[0]

    @property
    def gives_instances(self) -> bool:
        """Whether the model gives instances, and not maps of pixels alone."""
        return getattr(self.model, "instance_on", True)

    def results(
        self, images: Picture | list | tuple, threshold: float | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """All that the model gives for one image or a list of images.

        Arguments and errors are those of a call.

        Returns:
            for each image what Detectron2's `DefaultPredictor` gives, on the CPU: "instances" as of
            a call, and "panoptic_seg" and "sem_seg" of a Mask DINO that makes them
        """
        if isinstance(images, list | tuple):
            return self.run(images, threshold)
        return self.run([images], threshold)[0]

    @torch.inference_mode()
    def run(self, images: Sequence[Picture], threshold: float | None) -> list[dict[str, Any]]:
        """The results of a list of images, see `results`."""
        thresholds = self.thresholds
        if threshold is not None:
            require_share(threshold=threshold)
            thresholds = dict.fromkeys(self.classes, threshold)
        narrow = self.dtype != torch.float32
        with torch.autocast(self.model.device.type, self.dtype, enabled=narrow):
            results = self.model([self.prepare(image) for image in images])
        least = torch.tensor([thresholds.get(name, 0.0) for name in self.classes])
        return [self.on_cpu(result, least) for result in results]

    def on_cpu(self, result: dict[str, Any], least: Tensor) -> dict[str, Any]:
        """The results of an image on the CPU, with instances of at least the scores (K,)."""
        found: dict[str, Any] = {
            name: (x[0].to("cpu"), x[1]) if name == "panoptic_seg" else x.to("cpu")
            for name, x in result.items()
        }
        if "instances" in found:
            instances: Instances = found["instances"]
            self.highest = max([self.highest, *instances.scores.tolist()])
            found["instances"] = instances[instances.scores >= least[instances.pred_classes]]
        return found

    def prepare(self, image: Picture) -> dict:
        """Detectron2's input for one image."""
        array = self.read(image)
        height, width = array.shape[:2]
        tensor = torch.from_numpy(self.augment(array).transpose(2, 0, 1).copy())
        return {"image": tensor, "height": height, "width": width}

    def augment(self, image: np.ndarray) -> np.ndarray:
        """Apply the augmentations to an image (H, W, C); an exported model needs none."""
        if not self.augmentations:
            return image
        from detectron2.data import transforms as T

        resized = T.AugInput(image)
        T.AugmentationList(self.augmentations)(resized)
        return resized.image

    def read(self, image: Picture) -> np.ndarray:
        """Read an image of any kind as (H, W, C) in the format of the model."""
        if isinstance(image, np.ndarray):
            if image.shape[2:] == (1,):
                image = image[:, :, 0]
            is_image = image.ndim > 1 and image.size > 0 and image.shape[2:] in ((), (3,))
            if image.dtype != np.uint8 or not is_image:
                raise ValueError(
                    "an array has to be an image of uint8, RGB (H, W, 3) or grey (H, W), but this "
                    f"one is {image.shape} of {image.dtype}"
                )
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            check_mode(image.mode, "a PIL image")
            return to_array(image, self.image_format)
        if not isinstance(image, str | os.PathLike):
            raise ValueError(
                "an image has to be a path, a PIL image or an RGB array (H, W, 3) of uint8, and "
                f"several a list of them, but this is of type {type(image).__name__}"
            )
        return read_image(os.fspath(image), self.image_format)


def load(
    config: str | os.PathLike = "",
    weights: str | os.PathLike = "",
    device: str | None = None,
    overrides: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    thresholds: Thresholds = None,
    runtime: str = "",
) -> Predictor:
    """Load a model with its weights.

    Args:
        config: name of a published checkpoint, such as "dino_R_50_4scale_12ep" of the paper's
            authors or "detrex/dino_R_50_4scale_12ep" of detrex; or, with `weights`, of any config,
            see `model_zoo`; or a config file; or the output folder of a training run, or a
            checkpoint in it, which have their config; or file or URL of an exported model, .onnx or
            .pt2
        weights: file, URL or `dino_d2://NAME`; default: those of the published checkpoint, those
            that the config file names, or the best or else the last of a training run. Without a
            config, a checkpoint in an output folder
        device: default: the GPU if there is one
        overrides: of the config, see `apply_overrides`
        dtype: of autocast, see `Predictor`; of an ONNX file what OpenVINO computes in
        thresholds: score threshold for all classes, or by class name ("" for the others); default:
            those of the best F1 at the last evaluation of the training run, otherwise 0
        runtime: of an ONNX file, "onnxruntime" or "openvino"; default: the first of them that is
            installed

    Raises:
        FileNotFoundError: no such config or, without weights, no such published checkpoint; or a
            folder is not the output of a training run
        ValueError: an invalid device, dtype, override, name or threshold, or a config of another
            model or of images with other channels
        CheckpointError: the weights cannot be found, or are not complete
        ExportError: an exported file is damaged or not ours, or ONNX Runtime is missing
        ModuleNotFoundError: it is not an exported file, and Detectron2 is not installed
    """
    config, weights = _name("config", config), _name("weights", weights or "")
    files = [x for x in (weights, config) if x.lower().endswith(EXPORTED)]
    if files:
        if overrides or (config and weights):
            raise ValueError(f"'{files[0]}' is exported: it has no config to name or change")
        return load_exported(files[0], device, dtype, thresholds, runtime)
    if runtime:
        raise ValueError(f"a runtime is for exported files: leave out {runtime!r}")
    if not INSTALLED:
        raise ModuleNotFoundError(MISSING.format("a model that is not exported"), name="detectron2")
    from .weights.trained import load_trained

    return load_trained(config, weights, device, overrides, dtype, thresholds)


def load_exported(
    file: str, device: str | None, dtype: torch.dtype, thresholds: Thresholds, runtime: str
) -> Predictor:
    """The predictor of an exported file, which runs where it was exported, in its own precision.

    Raises:
        ValueError: another device is named, or a threshold is invalid
        FileNotFoundError, ExportError: as of `export.Exported`
        CheckpointError: it cannot be downloaded
    """
    from .export import ExportedModel

    check_device(device or "cpu")
    path = fetch(file) if "://" in file else file
    model = ExportedModel(Path(path).expanduser(), runtime, dtype)
    if torch.device(device or model.device) != model.device:
        raise ValueError(f"'{file}' runs on {model.device.type}: name no other device")
    about = model.file.about
    return Predictor(
        model,
        classes=about.classes,
        augmentations=(),
        image_format=about.image_format,
        thresholds=merge_thresholds(about.thresholds, thresholds, about.classes),
    )


def merge_thresholds(
    found: Mapping[str, float], given: float | Mapping[str, float] | None, classes: Sequence[str]
) -> dict[str, float]:
    """Thresholds by class: those that an evaluation found, replaced by those that are given.

    >>> merge_thresholds({"": 0.3, "cat": 0.4}, {"dog": 0.5}, ["cat", "dog", "bird"])
    {'cat': 0.4, 'dog': 0.5, 'bird': 0.3}

    Args:
        found, given: for all classes, or by name, with "" for classes that are not named
        classes: names
    """
    merged: dict[str, float] = {}
    known = {name: x for name, x in found.items() if name in ("", *classes)}
    for part in (
        known,
        given if isinstance(given, Mapping) else {} if given is None else {"": given},
    ):
        merged |= dict.fromkeys(classes, part[""]) if "" in part else {}
        merged |= {name: x for name, x in part.items() if name}
    return merged


def _name(argument: str, value: str | os.PathLike) -> str:
    """Raise a ValueError if an argument is neither a string nor a path."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{argument} is of type {type(value).__name__}: give a name or a path")
    return os.fspath(value)
