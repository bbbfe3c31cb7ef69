"""Exports the detector as a graph: PyTorch's `.pt2` and ONNX, see `projects/dino/EXPORT.md`.

A graph maps a batch of padded images and their sizes to boxes, scores and labels. Height and width
are fixed on export, the number of images is not.
"""

import ast
import json
import warnings
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram

from ..modeling.dino import DINO
from ..modeling.mask_dino import MaskDINO
from ..modeling.masks import mask_logits
from ..modeling.postprocess import D, non_maximum_suppression, reorder
from ..ops import reference
from ..structures import MaskDetections, Pixels
from .runtime import ABOUT, INPUTS, About, ExportError, kind_of, needs

OPSET = 18  # has GridSample, LayerNormalization and everything else as one operator
SCOPES = "pkg.torch.onnx.name_scopes"  # PyTorch's exporter notes there which module a node is of


class Exportable(nn.Module):
    """DINO from pixels to detections, on tensors only, for export."""

    def __init__(self, model: DINO, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype  # of autocast
        self.model = copy(model)  # of the same parameters, but for those that only training needs
        training = "denoising", "branches", "passes"
        self.model._modules = {k: x for k, x in model._modules.items() if k not in training}

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect in padded images.

        Args:
            images: (B, C, H, W) uint8, each in the upper left corner; padding is ignored
            image_sizes: (B, 2) int64, height and width of each image without padding

        Returns:
            the fields of `Detections`, as a tuple, so that files do not depend on this package;
            boxes (x0, y0, x1, y1) in pixels of the input, inside the image. With NMS, those that it
            suppresses come last, with a score of 0. Of Mask DINO also logits of masks (B, N, h, w),
            of the padded images; stuff has a score of 0
        """
        model = self.model
        padding = padding_of(images, image_sizes)
        pixels = (images.float() - model.pixel_mean) / model.pixel_std
        pixels = pixels.masked_fill(padding[:, None], 0)
        # Autocast, even if not enabled, takes the names of modules out of the graph.
        is_narrow = self.dtype != torch.float32
        with torch.autocast(images.device.type, self.dtype) if is_narrow else nullcontext():
            output = model.detect(pixels, padding)
        found: Any = model.best(output.result.layers[-1])
        if model.nms is not None:
            found = distinct_first(found, model.nms)
        if output.pixels is not None:
            found = with_maps(found, output.pixels)
            if isinstance(model, MaskDINO) and model.panoptic_on:
                stuff = model.is_stuff(found.labels)
                found = found._replace(scores=found.scores.masked_fill(stuff, 0))
            found = best_first(found)
        limit = image_sizes.flip(1).tile(2)[:, None].to(found.boxes.dtype)
        return tuple(found._replace(boxes=(found.boxes * limit).clamp(min=0).minimum(limit)))


def distinct_first(found: D, nms: float) -> D:
    """Detections in descending order of score, which is 0 for those that NMS suppresses."""
    suppressed = ~non_maximum_suppression(found, nms)
    return best_first(found._replace(scores=found.scores.masked_fill(suppressed, 0)))


def best_first(found: D) -> D:
    """Detections in descending order of score."""
    return reorder(found, found.scores.topk(found.scores.shape[1], dim=1).indices)


def with_maps(found: MaskDetections, pixels: Pixels) -> MaskDetections:
    """With maps of logits in place of embeddings, and scores times the certainty of masks."""
    maps = mask_logits(found.masks, pixels.maps)
    height, width = maps.shape[-2:]
    limit = pixels.extent * torch.tensor([width, height], device=maps.device)
    below = torch.arange(height, device=maps.device) < limit[:, 1:]
    right = torch.arange(width, device=maps.device) < limit[:, :1]
    inside = (maps > 0) & (below[:, None, :, None] & right[:, None, None])
    total = (maps.sigmoid() * inside).sum((2, 3))
    certainty = total / inside.sum((2, 3)).clamp(min=1)
    return found._replace(scores=found.scores * certainty, masks=maps)


def padding_of(images: Tensor, image_sizes: Tensor) -> Tensor:
    """(B, H, W), True on padding."""
    height, width = images.shape[-2:]
    below = torch.arange(height, device=images.device) >= image_sizes[:, :1]
    right = torch.arange(width, device=images.device) >= image_sizes[:, 1:]
    return below[:, :, None] | right[:, None]


def export(
    model: DINO,
    size: tuple[int, int],
    batch_size: int | None = None,
    keep_operator: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ExportedProgram:
    """Export a graph.

    Args:
        model: in evaluation mode; `fold_norms` makes its graph smaller
        size: height and width of all images, including padding
        batch_size: B; None: any
        keep_operator: keep `dino_d2::ms_deform_attn` in the graph, which then needs this package
            and uses its kernels. By default it is decomposed into `grid_sample`
        dtype: of autocast, which becomes part of the graph

    Raises:
        ExportError: the model cannot take this size, or needs a fixed number of images
    """
    check(model, size)
    count = batch_size or 2  # of one, PyTorch would conclude that it is always one
    images = torch.zeros(count, len(model.pixel_mean), *size, dtype=torch.uint8)
    inputs = images.to(model.device), torch.tensor([size] * count, device=model.device)
    axes = {} if batch_size else {0: Dim("batch", min=1)}
    with torch.no_grad():
        try:
            program = torch.export.export(
                Exportable(model, dtype), inputs, dynamic_shapes=(axes, axes)
            )
        except UserError as error:
            raise ExportError(
                "the graph of this model depends on the number of images: fix it, with "
                "--batch-size 1 or batch_size=1"
            ) from error
    if keep_operator:
        return program
    table = {
        torch.ops.dino_d2.ms_deform_attn.default: reference.forward,
        torch.ops.aten.upsample_nearest2d.vec: nearest,
    }
    return program.run_decompositions(table)


def nearest(image: Tensor, size: list[int] | None, scales: list[float] | None = None) -> Tensor:
    """PyTorch's nearest interpolation of (B, C, H, W), by indices.

    ONNX's Resize divides by the inverse of PyTorch's factor: from 42 to 6 pixels, half of them
    differ, and padding would be masked in other places.

    Args:
        size: height and width of the result, or None
        scales: factors of height and width, without a size
    """
    lengths = image.shape[2:]
    counts = size or [int(x * scale) for x, scale in zip(lengths, scales or (), strict=True)]
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        step = 1 / scales[i] if scales else length / count
        index = torch.arange(count, device=image.device, dtype=torch.float32)
        image = image.index_select(2 + i, (index * step).long())
    return image


def check(model: DINO, size: tuple[int, int]) -> None:
    """Raise an ExportError if the model is in training mode, does not output instances, or pads
    images of this size."""
    if model.training:
        raise ExportError("the model is in training mode: call model.eval() before exporting it")
    if not getattr(model, "instance_on", True):
        raise ExportError(
            "exported files need instances, which this model does not output: set MODEL.DINO.TEST."
            "INSTANCE_ON (model.instance_on) to True"
        )
    if min(size) < 1:
        raise ExportError(f"images of {size[0]} x {size[1]} pixels are empty: name another size")
    image = torch.zeros(len(model.pixel_mean), *size)
    padded = tuple(model.preprocess_images([{"image": image}]).tensor.shape[-2:])
    if padded != tuple(size):
        raise ExportError(
            f"the backbone cannot take images of {size[0]} x {size[1]} pixels as they are: the "
            f"nearest size is {padded[0]} x {padded[1]}"
        )


def save(program: ExportedProgram, path: Path, about: About) -> None:
    """Write `.onnx` or `.pt2`; an ExportError for another suffix or a missing package."""
    if kind_of(path) == ".pt2":
        with warnings.catch_warnings():
            # Of weights that share memory; export.py compares the file with the model.
            warnings.filterwarnings("ignore", "No complete tensor found")
            torch.export.save(program, path, extra_files={ABOUT: json.dumps(about._asdict())})
        return
    onnx = needs("onnx")
    model = to_onnx(program).model_proto
    for i, node in enumerate(model.graph.node):
        node.name = f"{scope_of(node)}{node.op_type}_{i}"
        del node.metadata_props[:]  # they have paths of the machine that exports
    for value in (*model.graph.input, *model.graph.output):
        axis = value.type.tensor_type.shape.dim[0]
        if axis.dim_param:  # else the number of images is fixed, and setting a name erases it
            axis.dim_param = "batch"  # PyTorch's own name is s and a number,
    del model.graph.value_info[:], model.graph.metadata_props[:]  # in these too, unneeded
    properties = {key: json.dumps(value) for key, value in about._asdict().items()}
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def to_onnx(program: ExportedProgram) -> "torch.onnx.ONNXProgram":
    """Convert to ONNX with standard operators, all in one file."""
    needs("onnxscript")
    with torch.no_grad():  # with gradients PyTorch computes attention with a bias in another way
        exported = torch.onnx.export(
            program,
            input_names=INPUTS,
            output_names=MaskDetections._fields[: len(program.graph_signature.user_outputs)],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    return exported


def scope_of(node: Any) -> str:
    """The module that a node of an ONNX graph belongs to, named as in a checkpoint, and a slash."""
    notes = {note.key: note.value for note in node.metadata_props}
    scopes = ast.literal_eval(notes.get(SCOPES, "[]"))  # from the outermost module to the operator
    modules = [x.removeprefix("model.") for x in scopes if x.startswith("model.")]
    return f"{modules[-1]}/" if modules else ""
