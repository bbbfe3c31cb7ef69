"""Converts state dicts of Mask DINO's authors' code (IDEA-Research/MaskDINO) to ours and back.

Its encoder and decoder have levels in opposite orders. Configs of one kind have the coarsest first
in the encoder, and their first projection takes the backbone's coarsest feature; the others the
reverse. Ours are finest first everywhere.
"""

import re

import torch
from torch import Tensor

from .dino import with_empty_slot
from .renaming import CheckpointError, State, rename

HEADS = 8  # of every published model
_ENCODER = "sem_seg_head.pixel_decoder.transformer."
_PREDICTOR = "sem_seg_head.predictor."
# Names: ours, theirs; see `rename`.
_TABLE = f"""
    neck.downsamples                      sem_seg_head.pixel_decoder.input_proj.extra
    neck.projections                      sem_seg_head.pixel_decoder.input_proj
    pixel_embedding.projection            sem_seg_head.pixel_decoder.mask_features
    pixel_embedding.lateral.1             sem_seg_head.pixel_decoder.adapter_1.norm
    pixel_embedding.lateral.0             sem_seg_head.pixel_decoder.adapter_1
    pixel_embedding.output.1              sem_seg_head.pixel_decoder.layer_1.norm
    pixel_embedding.output.0              sem_seg_head.pixel_decoder.layer_1
    encoder.level_embed.weight            {_ENCODER}level_embed
    encoder.layers.#.ffn.layers.0         {_ENCODER}encoder.layers.#.linear1
    encoder.layers.#.ffn.layers.1         {_ENCODER}encoder.layers.#.linear2
    encoder                               {_ENCODER}encoder
    query_selection.memory_proj           {_PREDICTOR}enc_output
    query_selection.memory_norm           {_PREDICTOR}enc_output_norm
    query_selection.content               {_PREDICTOR}query_feat
    query_selection.anchors               {_PREDICTOR}query_embed
    decoder.layers.#.norm1                {_PREDICTOR}decoder.layers.#.norm2
    decoder.layers.#.norm2                {_PREDICTOR}decoder.layers.#.norm1
    decoder.layers.#.ffn.layers.0         {_PREDICTOR}decoder.layers.#.linear1
    decoder.layers.#.ffn.layers.1         {_PREDICTOR}decoder.layers.#.linear2
    decoder.position_head.mlp             {_PREDICTOR}decoder.ref_point_head
    decoder.box_heads                     {_PREDICTOR}decoder.bbox_embed
    decoder.class_heads.0                 {_PREDICTOR}class_embed
    decoder.mask_head                     {_PREDICTOR}mask_embed
    decoder                               {_PREDICTOR}decoder
    denoising.label_embed                 {_PREDICTOR}label_enc
"""
_ALIASES = re.compile(
    r"sem_seg_head\.predictor\.(decoder_norm|_?bbox_embed|decoder\.bbox_embed\.[1-9]\d*)\."
    r"|criterion\."
)
_LEVELS = re.compile(
    r"(encoder|decoder)\.(level_embed\.|layers\.\d+\.(self|cross)_attn\."
    r"(sampling_offsets|attention_weights)\.)"
)


def from_maskdino(state: State) -> State:
    """Convert Mask DINO; the order of its levels is that of its projections."""
    coarsest_first = is_coarsest_first(state)
    state = _without_no_object(state)
    state = {key: x for key, x in state.items() if not _ALIASES.match(key)}
    state = rename(_with_levels(state), _TABLE)
    return with_empty_slot(_flip(state, "encoder" if coarsest_first else "decoder"))


def to_maskdino(state: State, *, coarsest_first: bool) -> State:
    """Convert ours back, with the aliases of the published files, for either order of levels.

    A CheckpointError for a model with parts that the authors' code does not have.
    """
    static = "query_selection.anchors.weight" in state
    for key in ("query_selection.class_head.", "query_selection.content"):
        other = [x for x in state if x.startswith(key)]
        if other and not static:
            raise CheckpointError(
                f"the authors' Mask DINO has no {other[0]}, so their layout cannot store it: "
                "keep the layout of dino_d2"
            )
    state = _flip(state, "encoder" if coarsest_first else "decoder")
    state["denoising.label_embed.weight"] = state["denoising.label_embed.weight"][:-1]
    state = _with_no_object(rename(state, _TABLE, back=True))
    prefix = "sem_seg_head.pixel_decoder.input_proj."
    count = len({key.split(".")[3] for key in state if key.startswith(prefix)} - {"extra"})
    levels = {}
    for key in [key for key in state if key.startswith(prefix)]:
        level, rest = key.removeprefix(prefix).removeprefix("extra.").split(".", 1)
        number = int(level) + count
        if "extra" not in key:
            number = count - 1 - int(level) if coarsest_first else int(level)
        levels[f"{prefix}{number}.{rest}"] = state.pop(key)
    state |= levels
    layers = {key.split(".")[4] for key in state if key.startswith(f"{_PREDICTOR}decoder.layers.")}
    first = f"{_PREDICTOR}decoder.bbox_embed.0."
    for key in [key for key in state if key.startswith(first)]:
        rest, x = key.removeprefix(first), state[key]
        state[f"{_PREDICTOR}_bbox_embed.{rest}"] = x
        for i in layers:
            state[f"{_PREDICTOR}decoder.bbox_embed.{i}.{rest}"] = x
            state[f"{_PREDICTOR}bbox_embed.{i}.{rest}"] = x
    for kind in ("weight", "bias"):
        state[f"{_PREDICTOR}decoder_norm.{kind}"] = state[f"{_PREDICTOR}decoder.norm.{kind}"]
    return state


def _without_no_object(state: State) -> State:
    """Take the row of no object, which models with a softmax have, out of the class head."""
    classes = len(state[f"{_PREDICTOR}label_enc.weight"])
    heads = {kind: state[f"{_PREDICTOR}class_embed.{kind}"] for kind in ("weight", "bias")}
    if len(heads["bias"]) == classes:
        return state
    return state | {
        f"{_PREDICTOR}class_embed.{part}{kind}": x
        for kind, head in heads.items()
        for part, x in (("", head[:classes]), ("no_object.", head[classes:]))
    }


def _with_no_object(state: State) -> State:
    """The reverse."""
    state = dict(state)
    for kind in ("weight", "bias"):
        if (row := state.pop(f"{_PREDICTOR}class_embed.no_object.{kind}", None)) is not None:
            key = f"{_PREDICTOR}class_embed.{kind}"
            state[key] = torch.cat([state[key], row])
    return state


def anchor_sides(state: State) -> list[float]:
    """The sides of anchors of each level, finest first, that a file was trained with; []: DINO's.

    The code counts levels in the order of its decoder, which is the reverse of its encoder's.
    """
    count = len(state[f"{_ENCODER}level_embed"])
    return [] if is_coarsest_first(state) else [0.05 * 2**i for i in reversed(range(count))]


def is_coarsest_first(state: State) -> bool:
    """Whether the first projection takes the coarsest feature, which has most channels."""
    return next(iter(_projections(state).values())) == max(_projections(state).values())


def _projections(state: State) -> dict[int, int]:
    """By the number of each 1x1 projection, in ascending order, the channels it takes."""
    pattern = re.compile(r"sem_seg_head\.pixel_decoder\.input_proj\.(\d+)\.0\.weight")
    found = {
        int(match[1]): x.shape[1]
        for key, x in state.items()
        if (match := pattern.fullmatch(key)) and x.shape[-1] == 1
    }
    return dict(sorted(found.items()))


def _with_levels(state: State) -> State:
    """Number projections from the finest level on, and those that make further levels from 0."""
    projections = _projections(state)
    order = sorted(projections, key=lambda number: projections[number])
    prefix = "sem_seg_head.pixel_decoder.input_proj."
    renamed = {}
    for key, x in state.items():
        if key.startswith(prefix):
            number, rest = key.removeprefix(prefix).split(".", 1)
            i = int(number)
            level = str(order.index(i)) if i in order else f"extra.{i - len(order)}"
            key = f"{prefix}{level}.{rest}"
        renamed[key] = x
    return renamed


def _flip(state: State, stage: str) -> State:
    """Reverse the order of levels in the tensors of a stage that have them."""
    count = len(state["encoder.level_embed.weight"])
    return {
        key: _flip_levels(x, key, count)
        if (match := _LEVELS.match(key)) and match[1] == stage
        else x
        for key, x in state.items()
    }


def _flip_levels(x: Tensor, key: str, count: int) -> Tensor:
    if "level_embed" in key:
        return x.flip(0)
    return torch.flatten(x.unflatten(0, (HEADS, count, -1)).flip(1), 0, 2)
