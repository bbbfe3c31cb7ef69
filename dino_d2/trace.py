"""Records intermediate results of a forward pass by hooks, without changes to the model.

    output = trace(model, images)

`dino_d2.visualize` plots it.
"""

from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from .layers import DeformableAttention, DenseAttention, SelfAttention
from .modeling.dino import DINO, padding_mask
from .modeling.mask_loss import MaskCriterion, MaskTruth
from .modeling.masks import UnifiedQuerySelection, mask_logits, sample_maps
from .modeling.matcher import queries_of_boxes
from .modeling.query_selection import ProposalQueries, PureQuerySelection
from .modeling.tokens import take_tokens, token_centers
from .ops.reference import resolve
from .structures import DetectorOutput, FeaturePyramid, Match, Pixels, Target, stack_predictions


class Selection(NamedTuple):
    """The encoder tokens that became queries, in the order of the queries."""

    scores: Tensor  # (B, Q) in [0, 1], what they were selected for
    centers: Tensor  # (B, Q, 2), (x, y) of the token
    levels: Tensor  # (B, Q), int64 in [0, L)
    boxes: Tensor  # (B, Q, 4), the proposals


class LayerTrace(NamedTuple):
    """Where one decoder layer looked, without denoising queries.

    Places are relative to the image without its padding, and may be outside of it.
    """

    reference: Tensor  # (B, Q, 4) boxes or (B, Q, 2) points, what the layer started from
    self_attention: Tensor  # (B, Q, Q), mean over heads, each query's row sums to 1
    # Of deformable attention, or else what queries attend to: (B, Q, S), as `self_attention`.
    locations: Tensor | None  # (B, Q, H, L, P, 2), (x, y) of the sampling points
    weights: Tensor | None  # (B, Q, H, L, P), sums to 1 over levels and points
    attention: Tensor | None = None


class Trace(NamedTuple):
    """A forward pass, in float32 or wider on the CPU."""

    output: DetectorOutput
    shapes: tuple[tuple[int, int], ...]  # (H_l, W_l) of the levels
    selection: Selection | None  # None where queries are learned and not selected
    layers: list[LayerTrace]  # of the decoder
    scores: list[Tensor]  # (B, Q, K) in [0, 1] of each layer
    # (B, S, S), of the last encoder layer, as `self_attention`; None where it is deformable
    encoder_attention: Tensor | None = None


class StageMatching(NamedTuple):
    """The matched query of each box of an image, stage by stage."""

    stages: list[str]  # names of the N stages, in the order in which they refine each other
    queries: Tensor  # (N, M), -1 where a box has no query, see `queries_of_boxes`


class Denoised(NamedTuple):
    """Denoising queries of one image: G groups with R copies of the M boxes that take part.

    The first copy is positive; the second, of contrastive denoising, negative.
    """

    truth: Target  # (M,) and (M, 4)
    noised: Tensor  # (G, R, M, 4), what the decoder was given
    boxes: Tensor  # (G, R, M, 4), predictions of its last layer
    scores: Tensor  # (G, R, M) in [0, 1], there, for the class of the box


@torch.no_grad()
def trace(model: DINO, images: ImageList, targets: list[Target] | None = None) -> Trace:
    """Run the detector and record it; predictions are those of `model.detect`.

    Args:
        model: in evaluation mode, as dropout would differ in what is recomputed
        images: of `model.preprocess_images`
        targets: of `model.prepare_targets`; enables denoising, with PyTorch's random numbers
    """
    recorder = Recorder()
    with ExitStack() as hooks:
        recorder.watch(model, hooks)
        output = model.detect(images.tensor, padding_mask(images), targets)
    queries = output.result.queries
    assert queries is not None
    own = slice(-queries.content.shape[1], None)  # those of other branches stand before them
    first = slice(len(model.decoder.layers))  # extra passes come after
    parts = recorder.references[first], recorder.attention[first], recorder.looks[first]
    layers = [
        LayerTrace(
            reference[:, own],
            attention[:, own, own],
            *(None if x is None else x[:, own] for x in look),
        )
        for reference, attention, look in zip(*parts, strict=True)
    ]
    # Mask DINO's first are those of the queries that the first layer starts from.
    after = output.result.layers[-len(model.decoder.layers) :]
    scores = [model.class_scores(layer.logits) for layer in after]
    found = recorder.shapes, recorder.selection, layers, scores, recorder.encoder_attention
    return to_cpu(Trace(output, *found))


class Recorder:
    """The hooks, and what they recorded."""

    def __init__(self):
        self.references: list[Tensor] = []
        self.attention: list[Tensor] = []
        # Locations and weights of deformable attention, and weights of another one.
        self.looks: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = []
        self.encoder_attention: Tensor | None = None
        self.selection: Selection | None = None
        self.shapes: tuple[tuple[int, int], ...] = ()

    def watch(self, model: DINO, hooks: ExitStack) -> None:
        """Register hooks, which are removed with `hooks`."""
        add = hooks.enter_context
        add(model.query_selection.register_forward_hook(self.see_selection))
        last = getattr(model.encoder.layers[-1], "self_attn", None)
        if isinstance(last, DenseAttention):
            add(last.register_forward_hook(self.see_encoder))
        for layer in model.decoder.layers:
            add(layer.register_forward_pre_hook(self.see_reference))
            attention = layer.get_submodule("self_attn")
            add(attention.register_forward_hook(self.see_attention))
            add(layer.get_submodule("cross_attn").register_forward_hook(self.see_look))

    def see_selection(self, module: nn.Module, args: tuple, output: tuple) -> None:
        self.shapes = args[0].shapes
        if isinstance(module, PureQuerySelection):
            self.selection = selection_of(module, *args[:2], boxes=output[0].reference)

    # Attention is computed again with weights, as the model computes it without them.

    def see_encoder(self, module: DenseAttention, args: tuple, output: Tensor) -> None:
        self.encoder_attention = module.weights(*args)

    def see_reference(self, module: nn.Module, args: tuple) -> None:
        self.references.append(args[2])

    def see_attention(self, module: SelfAttention, args: tuple, output: Tensor) -> None:
        self.attention.append(module.weights(*args))

    def see_look(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if isinstance(module, DeformableAttention):
            self.looks.append((*sampling_points(module, *args), None))
        else:
            self.looks.append((None, None, cast(DenseAttention, module).weights(*args)))


def sampling_points(
    module: DeformableAttention, query: Tensor, reference: Tensor, memory: FeaturePyramid
) -> tuple[Tensor, Tensor]:
    """Locations (B, Q, H, L, P, 2) and weights (B, Q, H, L, P) of a call.

    Relative to the image without its padding.
    """
    sizes = module.num_heads, module.num_levels, module.num_points
    offsets = module.sampling_offsets(query).unflatten(-1, (*sizes, 2))
    logits = module.attention_weights(query).unflatten(-1, sizes)
    sides = [side for shape in memory.shapes for side in shape]
    locations, weights = resolve(sides, offsets.float(), logits.float(), reference)
    ratios = memory.valid_ratios[:, None, None, :, None]  # (B, 1, 1, L, 1, 2)
    return locations / ratios, weights


def selection_of(
    selection: PureQuerySelection,
    memory: FeaturePyramid,
    decoder: Any = None,
    *,
    boxes: Tensor,
) -> Selection:
    """Repeat the query selection, as it does not return the selected tokens.

    Args:
        decoder: whose heads those of a `UnifiedQuerySelection` are
        boxes: (B, Q, 4), the proposals
    """
    if isinstance(selection, UnifiedQuerySelection):
        class_head, box_head = decoder.class_heads[0], decoder.box_heads[0]
        tokens, anchors = selection.features(memory)
        logits = class_head(tokens)
    else:
        tokens, anchors, logits = selection.candidates(memory)
        box_head = selection.box_head
    tokens = selection.choose(tokens, anchors, logits, box_head)
    one_class = isinstance(selection, ProposalQueries)  # the first stands for any object
    scores = logits[..., 0] if one_class else logits.amax(-1)
    sizes = torch.tensor([height * width for height, width in memory.shapes], device=tokens.device)
    return Selection(
        scores=scores.gather(1, tokens).sigmoid(),
        centers=take_tokens(token_centers(memory), tokens),
        levels=torch.bucketize(tokens, sizes.cumsum(0), right=True),
        boxes=boxes,
    )


@torch.no_grad()
def match_stages(model: DINO, output: DetectorOutput, target: Any) -> StageMatching:
    """Match one image as in training: every layer and, unless class-agnostic, the proposals.

    Args:
        output: of this image alone
        target: on its device; of Mask DINO a `MaskTarget`, which is matched at random points
    """
    parts, proposals = [list(output.result.layers)], output.result.proposals
    names = [f"layer {i}" for i in range(1, len(model.decoder.layers) + 1)]
    count = len(target.boxes)
    if output.pixels is not None:
        assert isinstance(model.criterion, MaskCriterion)
        pixels = (x[0] for x in output.pixels)
        target, names = model.criterion.at_points(MaskTruth(*target, *pixels)), ["start", *names]
    if proposals is not None and not isinstance(model.query_selection, ProposalQueries):
        parts, names = [[proposals], *parts], ["proposals", *names]
    matches = [model.criterion.matcher(stack_predictions(part), [target]) for part in parts]
    return StageMatching(names, torch.cat([queries_of_boxes(x, count) for x in matches]))


def image_masks(masks: Tensor, pixels: Pixels, size: tuple[int, int]) -> Tensor:
    """Logits (n, height, width) of masks (n, C), of the first image without its padding.

    Bilinear samples of the maps at the centres of the pixels of an image of this size.
    """
    y, x = ((torch.arange(n) + 0.5) / n for n in size)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) * pixels.extent[0]
    maps = mask_logits(masks, pixels.maps[0])
    return sample_maps(maps[None], points[None], "border")[0]


def denoised_boxes(output: DetectorOutput, target: Any) -> Denoised | None:
    """Group the denoising queries of one image; None if it has no boxes.

    The output is of this image alone, with denoising, and the target on its device.
    """
    denoising = output.named("dn")
    assert denoising and denoising.queries and isinstance(denoising.match, Match)
    groups, (_, positives, indices) = denoising.repeats, denoising.match
    if not len(positives):
        return None
    which = indices.view(groups, -1)[0]
    truth = Target(target.labels[which], target.boxes[which])
    # In the order of `Denoising`, where a single image leaves no slot empty.
    shape = groups, -1, len(truth.labels)
    last = denoising.layers[-1]
    scores = last.logits[0].sigmoid().unflatten(0, shape)
    labels = truth.labels.expand(scores.shape[:-1])[..., None]
    return Denoised(
        truth=truth,
        noised=denoising.queries.reference[0].unflatten(0, shape),
        boxes=last.boxes[0].unflatten(0, shape),
        scores=scores.gather(-1, labels)[..., 0],
    )


def to_cpu(x: Any) -> Any:
    """Move lists and NamedTuples of tensors to the CPU, in float32 or wider."""
    if isinstance(x, Tensor):
        x = x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
        return x.cpu()
    if isinstance(x, list):
        return [to_cpu(part) for part in x]
    return x._make(map(to_cpu, x)) if hasattr(x, "_make") else x
