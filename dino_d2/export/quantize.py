"""INT8 versions of exported ONNX files, by ONNX Runtime's quantizer.

Backbone, neck, projections of attention and feed-forward parts become INT8: nearly all of the
arithmetic. Sampling, attention weights and heads stay float, see `FLOAT`.
"""

import re
import tempfile
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from torch import Tensor

from .runtime import INPUTS, needs

# By names of nodes, which are those of the modules in a checkpoint: pixels and boxes in pixels,
# positions, sampling locations, the logits of attention to them, selection, and heads. Also the
# projections to queries and keys, of which OpenVINO 2026.4 refuses the INT8 form.
FLOAT = re.compile(
    r"^[A-Z]|^(en|de)coder/|sampling_offsets|attention_weights|query_selection|head|self_attn/"
)
SHARED = ("Relu", "MaxPool")  # have the numbers of what they follow


def quantize(source: Path, target: Path, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Write an INT8 version of an ONNX file: the same graph, with QuantizeLinear nodes in it.

    Weights are symmetric with a scale by output channel, in 7 bits, as sums of products of 8 bits
    saturate on CPUs without VNNI. Activations are in 8 bits, from the minimum to the maximum
    that they have in the batches.

    Args:
        source: of `save`
        target: to be written
        batches: images and image_sizes as of `Exportable`, typical of what will be detected

    Returns:
        the number of operators with weights that are in INT8

    Raises:
        ExportError: a package is missing
    """
    onnx, _ = needs("onnx"), needs("onnxruntime")
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        folded = Path(folder, "folded.onnx")
        # Its symbolic shapes need a further package, and every shape but the first is fixed here.
        quant_pre_process(source, folded, skip_symbolic_shape=True)
        graph = onnx.load(folded).graph
        constants = {x.name for x in graph.initializer}
        # Not the first, which sees pixels: in INT8, OpenVINO loses 2 to 6 AP in it.
        _, *weighted = (node for node in graph.node if is_weighted(node, constants))
        convolved = {node.output[0] for node in weighted if node.op_type == "Conv"}
        nodes = weighted + [node for node in graph.node if follows(node, convolved)]
        quantize_static(
            folded,
            target,
            Calibration(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=sorted({node.op_type for node in nodes}),
            nodes_to_quantize=[node.name for node in nodes],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return len(weighted)


def is_weighted(node: Any, constants: Set[str]) -> bool:
    """Whether a node is a convolution or a linear layer that INT8 does not harm."""
    kinds = ("Conv", "Gemm", "MatMul")
    return node.op_type in kinds and node.input[1] in constants and not FLOAT.search(node.name)


def follows(node: Any, convolved: Set[str]) -> bool:
    """Whether a node can go on with the INT8 numbers of a convolution or a linear layer.

    Of additions those of a residual network; sums that are normalised afterwards stay float.
    """
    added = node.op_type == "Add" and not convolved.isdisjoint(node.input)
    return node.op_type in SHARED or added


class Calibration:
    """Batches as ONNX Runtime's quantizer reads them."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]):
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return batch and dict(zip(INPUTS, (x.numpy() for x in batch), strict=True))
