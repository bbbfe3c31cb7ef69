"""Runs exported files, without Detectron2.

`projects/dino/serve_onnx.py` runs ONNX files without this package.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..detectron import Boxes, Instances
from ..images import channels_of
from ..names import plural
from ..resizing import resize_masks
from ..structures import Detections, MaskDetections

INPUTS = ("images", "image_sizes")
ABOUT = "dino_d2"  # name of the metadata in a .pt2 file


class ExportError(ValueError):
    """A model cannot be exported, or an exported file cannot be used."""


class About(NamedTuple):
    """The metadata of an exported file."""

    classes: list[str]  # names of the labels
    size: tuple[int, int]  # height and width of images
    image_format: str  # channels of images: "RGB", "BGR", "L"
    batch_size: int | None  # None: any
    thresholds: dict[str, float] = {}  # score thresholds by class, of the best F1, where known


def fit(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize an image to fit into `size` as in evaluation, keeping its ratio, and pad it.

    Args:
        image: (h, w, C) uint8
        size: H and W

    Returns:
        (C, H, W) uint8 with the image in the upper left corner, and the resized height and width
    """
    height, width = image.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    inside = max(1, round(height * scale)), max(1, round(width * scale))
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    resized = np.asarray(picture.resize(inside[::-1], Image.Resampling.BILINEAR))
    padded = np.zeros((*size, image.shape[2]), np.uint8)
    padded[: inside[0], : inside[1]] = resized.reshape(*inside, -1)
    return padded.transpose(2, 0, 1), inside


class Graph(NamedTuple):
    """A file loaded by a runtime."""

    run: Callable[[Tensor, Tensor], Iterable[Tensor]]  # boxes, scores, labels and maybe masks
    about: About
    device: torch.device = torch.device("cpu")


class Exported:
    """An exported file, ready to run, on as many threads as PyTorch has.

    Args:
        path: of the file
        runtime: of an ONNX file, which runs on a CPU: "onnxruntime" or "openvino"; default: the
            first of them that is installed. A .pt2 file runs in PyTorch, on the device of its
            export
        dtype: that OpenVINO computes in, float32 or bfloat16; of other files it is in the file

    Raises:
        FileNotFoundError: the file does not exist
        ExportError: it is damaged, was not written by dino_d2, a package is missing, or the runtime
            or dtype is not for it
    """

    def __init__(self, path: Path, runtime: str = "", dtype: torch.dtype = torch.float32):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file '{path}'")
        runtime = runtime_of(path, runtime)
        if dtype != torch.float32 and (runtime != "openvino" or dtype != torch.bfloat16):
            raise ExportError(
                f"'{path}' computes in {runtime} as it was exported: leave out {dtype} (bfloat16 "
                "is a choice in OpenVINO, for ONNX files)"
            )
        self.graph = read_openvino(path, dtype) if runtime == "openvino" else READ[runtime](path)
        self.about = self.graph.about

    @torch.no_grad()
    def __call__(self, images: Tensor, image_sizes: Tensor) -> Detections | MaskDetections:
        """Detect in images as of `fit`; an ExportError for a wrong shape, number or type."""
        count, size = self.about.batch_size or max(len(images), 1), self.about.size
        expected = (count, channels_of(self.about.image_format), *size)
        if images.shape != expected or images.dtype != torch.uint8:
            raise ExportError(
                f"images of {tuple(images.shape)}, {images.dtype}, should be {expected} of uint8: "
                f"resized and padded to {size[0]} x {size[1]} pixels, as dino_d2.export.fit does"
            )
        if image_sizes.shape != (count, 2) or image_sizes.dtype != torch.int64:
            raise ExportError(
                f"image_sizes of {tuple(image_sizes.shape)}, {image_sizes.dtype}, should be "
                f"{(count, 2)} of int64: height and width of each image"
            )
        limit = torch.tensor(size, device=image_sizes.device)
        if not ((image_sizes >= 1) & (image_sizes <= limit)).all():
            raise ExportError(
                f"image_sizes {image_sizes.tolist()} should be height and width of each of the "
                f"{plural(count, 'image')}, at most {size[0]} and {size[1]}"
            )
        found = self.graph.run(images, image_sizes)
        return detections(x.to(images.device) for x in found)


class ExportedModel:
    """An exported file with the interface of a model: a list of dicts in, a list of dicts out.

    Images (C, height, width) of any size are resized and padded to that of the file.

    Args:
        path, runtime, dtype: as of `Exported`

    Raises:
        FileNotFoundError, ExportError: as of `Exported`
    """

    def __init__(self, path: Path, runtime: str = "", dtype: torch.dtype = torch.float32):
        self.file = Exported(path, runtime, dtype)
        self.pixel_mean = [0.0] * channels_of(self.file.about.image_format)  # is in the file
        self.device = self.file.graph.device

    def __call__(self, batch: list[dict]) -> list[dict]:
        count = self.file.about.batch_size or max(len(batch), 1)
        parts = [batch[i : i + count] for i in range(0, len(batch), count)]
        return [{"instances": x} for part in parts for x in self.detect(part, count)]

    def detect(self, batch: list[dict], count: int) -> Iterator[Instances]:
        """Detections in at most `count` images, in their own pixels."""
        size = self.file.about.size
        fitted = [fit(x["image"].permute(1, 2, 0).numpy(), size) for x in batch]
        fitted += fitted[-1:] * (count - len(batch))
        images, insides = zip(*fitted, strict=True)
        found = self.file(torch.from_numpy(np.stack(images)), torch.tensor(insides))
        for x, inside, *own in zip(batch, insides, *found, strict=False):
            yield in_pixels(detections(own), inside, (x["height"], x["width"]), size)


def in_pixels(
    found: Detections | MaskDetections,
    inside: tuple[int, int],
    image: tuple[int, int],
    size: tuple[int, int],
) -> Instances:
    """Detections (N, .) of a padded image in pixels of the image, without those of score 0.

    Args:
        inside: height and width of the image in the padded one
        image: its own height and width
        size: of the padded image
    """
    (height, width), (h, w) = image, inside
    boxes = Boxes(found.boxes * torch.tensor([width / w, height / h] * 2))
    boxes.clip(image)
    kept = (found.scores > 0) & boxes.nonempty()
    instances = Instances(image, pred_boxes=boxes[kept], scores=found.scores[kept])
    instances.pred_classes = found.labels[kept]
    if isinstance(found, MaskDetections):
        stride = size[0] // found.masks.shape[-2]
        instances.pred_masks = resize_masks(found.masks[kept], stride, inside, image)[0]
    return instances


def detections(outputs: Iterable[Tensor]) -> Detections | MaskDetections:
    """The outputs of a graph, by name."""
    parts = tuple(outputs)
    return Detections(*parts) if len(parts) == 3 else MaskDetections(*parts)


def installed(path: Path) -> list[str]:
    """The runtimes of a file of this name that are installed, the default first."""
    return [x for x in choices_of(path) if find_spec(x)]


def choices_of(path: Path) -> tuple[str, ...]:
    return RUNTIMES if kind_of(path) == ".onnx" else ("torch",)


def runtime_of(path: Path, name: str) -> str:
    """The runtime of a file, checked; raises an ExportError."""
    choices = choices_of(path)
    if name and name not in choices:
        raise ExportError(f"'{path}' does not run in {name!r}: it can in {' or '.join(choices)}")
    return name or (installed(path) or choices)[0]


def read_pt2(path: Path) -> Graph:
    """Load a .pt2 file; raise an ExportError if it is damaged or not ours."""
    try:  # before PyTorch, which would log tracebacks
        with ZipFile(path) as archive:
            intact = archive.testzip() is None
            texts = [archive.read(x) for x in archive.namelist() if x.endswith(f"/extra/{ABOUT}")]
    except BadZipFile:
        intact = False
    if not intact:
        raise ExportError(f"'{path}' is damaged or not a .pt2 file: export it again")
    about = read_about(path, json.loads(texts[0]) if texts else {})
    module = torch.export.load(path).module()
    device = next(module.parameters()).device
    return Graph(lambda *inputs: module(*(x.to(device) for x in inputs)), about, device)


def read_onnx(path: Path) -> Graph:
    """Load an ONNX file; raise an ExportError if it is damaged or not ours."""
    runtime = needs("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise damaged(path, error) from error
    notes = session.get_modelmeta().custom_metadata_map
    about = read_about(path, {key: json.loads(notes[key]) for key in About._fields if key in notes})

    def run(*inputs: Tensor) -> Iterable[Tensor]:
        arrays = dict(zip(INPUTS, (x.cpu().numpy() for x in inputs), strict=True))
        return map(torch.from_numpy, session.run(None, arrays))

    return Graph(run, about)


def read_openvino(path: Path, dtype: torch.dtype) -> Graph:
    """As `read_onnx`, in OpenVINO; by itself it would compute in bfloat16 where the CPU can."""
    core = needs("openvino").Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
    }
    try:
        model = core.read_model(path)
    except Exception as error:
        raise damaged(path, error) from error
    notes = {
        key: json.loads(model.get_rt_info(place).value)
        for key in About._fields
        if model.has_rt_info(place := ["framework", key])
    }
    about = read_about(path, notes)
    compiled = core.compile_model(model, "CPU", options)

    def run(*inputs: Tensor) -> Iterable[Tensor]:
        found = compiled(dict(zip(INPUTS, (x.cpu().numpy() for x in inputs), strict=True)))
        return [torch.from_numpy(found[i].copy()) for i in range(len(compiled.outputs))]

    return Graph(run, about)


def damaged(path: Path, error: Exception) -> ExportError:
    """What to say of an ONNX file that a runtime cannot read."""
    return ExportError(f"'{path}' is damaged or not an ONNX file: {str(error).splitlines()[0]}")


RUNTIMES = ("onnxruntime", "openvino")  # of ONNX files
READ = {"torch": read_pt2, "onnxruntime": read_onnx}


def read_about(path: Path, notes: dict[str, Any]) -> About:
    """Parse the metadata of a file; raise an ExportError if they are not ours."""
    if not set(About._fields) - {"thresholds"} <= notes.keys() <= set(About._fields):
        raise ExportError(f"'{path}' was not written by dino_d2: export it again")
    return About(**notes | {"size": tuple(notes["size"])})


def kind_of(path: Path) -> str:
    """The suffix of a file; raise an ExportError if it is neither .onnx nor .pt2."""
    if path.suffix not in (".onnx", ".pt2"):
        raise ExportError(f"'{path}' has to end in .onnx or .pt2, for the format of that name")
    return path.suffix


def needs(name: str) -> ModuleType:
    """Import an optional package; raise an ExportError if it is not installed."""
    if find_spec(name) is None:
        others = "openvino" if name == "openvino" else "onnx onnxscript onnxruntime"
        raise ExportError(f"ONNX needs the package {name}: pip install {others}")
    return import_module(name)
