"""Converts state dicts of other implementations to ours and back, by pure functions.

    official     IDEA-Research/DINO
    detrex       IDEA-Research/detrex, projects/dino
    mmdet        open-mmlab/mmdetection 3, configs/dino

They compute the same function under different names, with some tensors repeated or left out.
`backbones.py` converts weights of backbones; `weights/` reads files and loads models.
"""

import re
from collections import defaultdict

import torch
from torch import Tensor

from .adapt import CLASS_BIAS, HEAD, LABELS, TRAINING_ONLY
from .backbones import convnext_of_timm, focalnet_of_timm, resnet_names, swin_of_mmdet
from .renaming import CheckpointError, State, move, rename

# Names: ours, theirs; see `rename`.
_OFFICIAL = f"""{resnet_names("backbone.0.body")}
    backbone                              backbone.0
    neck.downsamples                      input_proj.extra
    neck.projections                      input_proj
    encoder.level_embed.weight            transformer.level_embed
    encoder.layers.#.ffn.layers.0         transformer.encoder.layers.#.linear1
    encoder.layers.#.ffn.layers.1         transformer.encoder.layers.#.linear2
    encoder                               transformer.encoder
    query_selection.memory_proj           transformer.enc_output
    query_selection.memory_norm           transformer.enc_output_norm
    query_selection.class_head            transformer.enc_out_class_embed
    query_selection.box_head              transformer.enc_out_bbox_embed
    query_selection.content               transformer.tgt_embed
    decoder.layers.#.norm1                transformer.decoder.layers.#.norm2
    decoder.layers.#.norm2                transformer.decoder.layers.#.norm1
    decoder.layers.#.ffn.layers.0         transformer.decoder.layers.#.linear1
    decoder.layers.#.ffn.layers.1         transformer.decoder.layers.#.linear2
    decoder.position_head.mlp             transformer.decoder.ref_point_head
    decoder.class_heads                   transformer.decoder.class_embed
    decoder.box_heads                     transformer.decoder.bbox_embed
    decoder                               transformer.decoder
    denoising.label_embed                 label_enc
"""
DETREX = """
    neck.projections.#.0                  neck.convs.#.conv
    neck.projections.#.1                  neck.convs.#.norm
    neck.downsamples.#.0                  neck.extra_convs.#.conv
    neck.downsamples.#.1                  neck.extra_convs.#.norm
    encoder.level_embed.weight            transformer.level_embeds
    encoder.layers.#.self_attn            transformer.encoder.layers.#.attentions.0
    encoder.layers.#.ffn.layers.0         transformer.encoder.layers.#.ffns.0.layers.0.0
    encoder.layers.#.ffn.layers.1         transformer.encoder.layers.#.ffns.0.layers.1
    encoder.layers.#.norm1                transformer.encoder.layers.#.norms.0
    encoder.layers.#.norm2                transformer.encoder.layers.#.norms.1
    query_selection.memory_proj           transformer.enc_output
    query_selection.memory_norm           transformer.enc_output_norm
    query_selection.content               transformer.tgt_embed
    decoder.layers.#.self_attn            transformer.decoder.layers.#.attentions.0.attn
    decoder.layers.#.cross_attn           transformer.decoder.layers.#.attentions.1
    decoder.layers.#.ffn.layers.0         transformer.decoder.layers.#.ffns.0.layers.0.0
    decoder.layers.#.ffn.layers.1         transformer.decoder.layers.#.ffns.0.layers.1
    decoder.layers.#.norm1                transformer.decoder.layers.#.norms.0
    decoder.layers.#.norm2                transformer.decoder.layers.#.norms.1
    decoder.layers.#.norm3                transformer.decoder.layers.#.norms.2
    decoder.norm                          transformer.decoder.norm
    decoder.position_head.mlp             transformer.decoder.ref_point_head
    decoder.class_heads                   transformer.decoder.class_embed
    decoder.box_heads                     transformer.decoder.bbox_embed
    denoising.label_embed                 label_enc
"""
_MMDET = f"""{resnet_names("backbone")}
    neck.projections.#.0                  neck.convs.#.conv
    neck.projections.#.1                  neck.convs.#.gn
    neck.downsamples.#.0                  neck.extra_convs.#.conv
    neck.downsamples.#.1                  neck.extra_convs.#.gn
    encoder.level_embed.weight            level_embed
    encoder.layers.#.ffn.layers.0         encoder.layers.#.ffn.layers.0.0
    encoder.layers.#.norm1                encoder.layers.#.norms.0
    encoder.layers.#.norm2                encoder.layers.#.norms.1
    query_selection.memory_proj           memory_trans_fc
    query_selection.memory_norm           memory_trans_norm
    query_selection.content               query_embedding
    decoder.layers.#.self_attn            decoder.layers.#.self_attn.attn
    decoder.layers.#.ffn.layers.0         decoder.layers.#.ffn.layers.0.0
    decoder.layers.#.norm1                decoder.layers.#.norms.0
    decoder.layers.#.norm2                decoder.layers.#.norms.1
    decoder.layers.#.norm3                decoder.layers.#.norms.2
    decoder.position_head.mlp             decoder.ref_point_head
    decoder.class_heads                   bbox_head.cls_branches
    decoder.box_heads.#.layers.0          bbox_head.reg_branches.#.0
    decoder.box_heads.#.layers.1          bbox_head.reg_branches.#.2
    decoder.box_heads.#.layers.2          bbox_head.reg_branches.#.4
    denoising.label_embed                 dn_query_generator.label_embedding
"""
_NOT_DINO = re.compile(
    r"query_selection\.(?!memory_proj|memory_norm|class_head|box_head|content\.)\w+"
    r"|decoder\.(relation|position_head\.(?!mlp)\w+)|encoder\.position_scale"
    r"|encoder\.layers\.\d+\.self_attn\.in_proj_weight"
    r"|decoder\.layers\.\d+\.((cross_attn\.in_proj_weight)|(self_attn\.query_content))"
    r"|decoder\.class_heads\.\d+\.no_object"
)


_LAYER = "transformer.decoder.layers.0."
# The first whose tensors are all there. What DINO has: learned content without a position.
_SIGNS = (
    ("dino_d2", CLASS_BIAS),
    ("maskdino", "sem_seg_head.predictor.mask_embed.layers.0.weight"),
    ("detr", f"{_LAYER}multihead_attn.in_proj_weight"),
    ("dab_detr", f"{_LAYER}sa_qcontent_proj.weight"),
    ("deformable_detr", "transformer.level_embed", "query_embed.weight"),
    ("deformable_detr", "transformer.level_embed", "refpoint_embed.weight"),
    ("deformable_detr", "transformer.level_embed", "transformer.pos_trans.weight"),
    ("detrex_family", "transformer.level_embeds", "query_embedding.weight"),
    ("detrex_family", "transformer.level_embeds", "refpoint_embed.weight"),
    ("detrex_family", "transformer.level_embeds", "transformer.pos_trans.weight"),
    (
        *("detrex_family", "transformer.level_embeds"),
        *("transformer.decoder.query_scale.layers.0.weight", "bbox_embed.0.layers.0.weight"),
    ),
    ("huggingface_detr", "model.decoder.layers.0.encoder_attn.q_proj.weight"),
    ("huggingface_dab_detr", "model.query_refpoint_embeddings.weight"),
    ("huggingface_deformable_detr", "model.level_embed", "class_embed.0.bias"),
    ("official", "transformer.level_embed", "transformer.tgt_embed.weight"),
    (  # Relation-DETR's code has the first two, but no attentions
        *("detrex", "transformer.level_embeds", "transformer.tgt_embed.weight"),
        "transformer.encoder.layers.0.attentions.0.value_proj.weight",
    ),
    ("mmdet", "level_embed", "memory_trans_fc.weight"),
    ("torchvision", "layer1.0.conv1.weight"),
    ("convnext", "downsample_layers.0.0.weight"),
)


def detect_format(state: State) -> str | None:
    """One of the names above, in `detr.py` or in `backbones.py`, "dino_d2", or None if the format
    is unknown.

    Raises:
        CheckpointError: it is another model of the same code
    """
    for name, *keys in _SIGNS:
        if all(key in state for key in keys):
            return name
    for name, first, *others in reversed(_SIGNS):
        if others and first in state:
            raise CheckpointError(
                f"this is neither DINO nor one of its predecessors, but has the names of {name}"
            )
    return "model_zoo" if any(key.startswith("backbone.bottom_up.") for key in state) else None


def from_official(state: State) -> State:
    """Convert official DINO with a ResNet or a Swin transformer.

    The last row of its label embedding is unused if there are more rows than classes; ours is for
    empty slots, and zero.
    """
    state = rename(with_levels(_without_aliases(state)), _OFFICIAL)
    return with_empty_slot(share_heads(state), unused=1)


def from_detrex(state: State) -> State:
    """Convert detrex; adds a row of zeros for empty slots to the label embedding."""
    state = rename(_without_aliases(state), DETREX)
    state = focalnet_of_timm(convnext_of_timm(state))
    return with_empty_slot(share_heads(with_encoder_heads(state)))


def from_mmdet(state: State) -> State:
    """Convert mmdetection 3 with a ResNet or a Swin transformer; adds zero biases to the neck."""
    state = rename(swin_of_mmdet(state), _MMDET)
    biases = {
        key.replace(".weight", ".bias"): x.new_zeros(len(x))
        for key, x in state.items()
        if re.fullmatch(r"neck\.\w+\.\d+\.0\.weight", key)
    }
    return with_empty_slot(share_heads(with_encoder_heads(biases | state)))


def to_official(state: State) -> State:
    """Convert our state dict to official DINO's, with heads for all layers and its aliases.

    Branches and passes that only training has are left out. A CheckpointError for a model with
    parts that official DINO does not have.
    """
    state = {key: x for key, x in state.items() if not key.startswith(TRAINING_ONLY)}
    for part in filter(None, map(_NOT_DINO.match, sorted(state))):
        raise CheckpointError(
            f"official DINO has no {part[0]}, so the official layout cannot store it: "
            "keep the layout of dino_d2"
        )
    state = rename(state, _OFFICIAL, back=True)
    levels = {_level(key) for key in state if re.match(r"input_proj\.\d", key)}
    for key in [key for key in state if key.startswith("input_proj.extra.")]:
        _, _, level, rest = key.split(".", 3)
        state[f"input_proj.{int(level) + len(levels)}.{rest}"] = state.pop(key)

    prefix = "transformer.decoder."
    layers = {key.split(".")[3] for key in state if key.startswith(f"{prefix}layers.")}
    for kind in ("class_embed", "bbox_embed"):
        heads = {k: x for k, x in state.items() if k.startswith(f"{prefix}{kind}.")}
        for layer in sorted(layers):
            own = f"{prefix}{kind}.{layer}."
            given = own if any(k.startswith(own) for k in heads) else f"{prefix}{kind}.0."
            head = move({k: x for k, x in heads.items() if k.startswith(given)}, given, own)
            state |= head | move(head, prefix, "")
    return state


def _without_aliases(state: State) -> State:
    """Remove the second copy of the decoder's heads in official DINO and detrex."""
    return {key: x for key, x in state.items() if not re.match(r"(class|bbox)_embed\.", key)}


def _level(key: str) -> int:
    return int(key.split(".")[1])


def with_levels(state: State) -> State:
    """Rename the projections that make further levels to `input_proj.extra`, from 0."""
    extra = [key for key, x in state.items() if _is_downsample(key, x)]
    first = min((_level(key) for key in extra), default=0)
    levels = {f"input_proj.{_level(key)}.": _level(key) - first for key in extra}
    for prefix, level in levels.items():
        state = move(state, prefix, f"input_proj.extra.{level}.")
    return state


def _is_downsample(key: str, x: Tensor) -> bool:
    return key.startswith("input_proj.") and x.dim() == 4 and x.shape[-1] == 3


def with_encoder_heads(state: State) -> State:
    """Rename the last heads, which belong to the encoder."""
    number = len({key.split(".")[2] for key in state if key.startswith("decoder.layers.")})
    state = move(state, f"decoder.class_heads.{number}.", "query_selection.class_head.")
    return move(state, f"decoder.box_heads.{number}.", "query_selection.box_head.")


def with_empty_slot(state: State, unused: int = 0) -> State:
    """Add a row of zeros for empty slots to the label embedding, if there is one.

    It replaces up to `unused` rows beyond those of the classes.
    """
    if LABELS not in state:
        return state
    rows, classes = state[LABELS], len(state.get(CLASS_BIAS, ()))
    rows = rows[: max(classes, len(rows) - unused)]
    return state | {LABELS: torch.cat([rows, rows.new_zeros(1, rows.shape[1])])}


def share_heads(state: State) -> State:
    """Replace equal heads of all decoder layers by one shared head."""
    copies = defaultdict(list)
    for key in state:
        if match := HEAD.match(key):
            copies[match[1], match[3]].append(key)
    if all(torch.equal(state[keys[0]], state[key]) for keys in copies.values() for key in keys):
        repeated = {key for keys in copies.values() for key in keys[1:]}
        return {key: x for key, x in state.items() if key not in repeated}
    return state
