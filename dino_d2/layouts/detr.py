"""Converts state dicts of DINO's predecessors by their authors to ours, by pure functions.

    detr             facebookresearch/detr
    dab_detr         IDEA-Research/DAB-DETR and DN-DETR, with dense attention
    deformable_detr  fundamentalvision/Deformable-DETR, and deformable models of the two above

They compute the same function; `dino.py` tells the formats apart.
"""

import re

from .adapt import LABELS
from .backbones import resnet_names
from .dino import share_heads, with_empty_slot, with_encoder_heads, with_levels
from .renaming import State, move, rename

# Names: ours, theirs; see `rename`.
_TRANSFORMER = f"""{resnet_names("backbone.0.body")}
    neck.downsamples                      input_proj.extra
    neck.projections                      input_proj
    encoder.level_embed.weight            transformer.level_embed
    encoder.position_scale                transformer.encoder.query_scale
    encoder.layers.#.ffn.layers.0         transformer.encoder.layers.#.linear1
    encoder.layers.#.ffn.layers.1         transformer.encoder.layers.#.linear2
    encoder.layers.#.ffn.activation       transformer.encoder.layers.#.activation
    encoder                               transformer.encoder
    query_selection.anchors               refpoint_embed
    query_selection.content               tgt_embed
    query_selection.content               patterns
    query_selection.reference_points      transformer.reference_points
    query_selection.memory_proj           transformer.enc_output
    query_selection.memory_norm           transformer.enc_output_norm
    query_selection.box_proj              transformer.pos_trans
    query_selection.box_norm              transformer.pos_trans_norm
    decoder.layers.#.ffn.layers.0         transformer.decoder.layers.#.linear1
    decoder.layers.#.ffn.layers.1         transformer.decoder.layers.#.linear2
    decoder.layers.#.ffn.activation       transformer.decoder.layers.#.activation
    decoder.position_head.mlp             transformer.decoder.ref_point_head
    decoder.position_head.scale           transformer.decoder.query_scale
    decoder.position_head.size            transformer.decoder.ref_anchor_head
    decoder.class_heads                   class_embed
    decoder.box_heads                     bbox_embed
    denoising.label_embed                 label_enc
"""
_DENSE = """
    decoder.layers.#.cross_attn                transformer.decoder.layers.#.multihead_attn
    decoder.layers.#.self_attn.query_content   transformer.decoder.layers.#.sa_qcontent_proj
    decoder.layers.#.self_attn.query_position  transformer.decoder.layers.#.sa_qpos_proj
    decoder.layers.#.self_attn.key_content     transformer.decoder.layers.#.sa_kcontent_proj
    decoder.layers.#.self_attn.key_position    transformer.decoder.layers.#.sa_kpos_proj
    decoder.layers.#.self_attn.value           transformer.decoder.layers.#.sa_v_proj
    decoder.layers.#.cross_attn.query_content  transformer.decoder.layers.#.ca_qcontent_proj
    decoder.layers.#.cross_attn.query_position transformer.decoder.layers.#.ca_qpos_proj
    decoder.layers.#.cross_attn.query_sine     transformer.decoder.layers.#.ca_qpos_sine_proj
    decoder.layers.#.cross_attn.key_content    transformer.decoder.layers.#.ca_kcontent_proj
    decoder.layers.#.cross_attn.key_position   transformer.decoder.layers.#.ca_kpos_proj
    decoder.layers.#.cross_attn.value          transformer.decoder.layers.#.ca_v_proj
"""
_DAB = (
    _DENSE
    + """
    decoder.layers.#.self_attn.output     transformer.decoder.layers.#.self_attn.out_proj
    decoder.layers.#.cross_attn.output    transformer.decoder.layers.#.cross_attn.out_proj
"""
)
_DEFORMABLE = """
    decoder.layers.#.norm1                transformer.decoder.layers.#.norm2
    decoder.layers.#.norm2                transformer.decoder.layers.#.norm1
"""
_REST = """
    decoder                               transformer.decoder
"""


def from_detr(state: State) -> State:
    """Convert DETR; the last row of its class head is that of no object."""
    state = _convert(state, _DENSE)
    for kind in ("weight", "bias"):
        head = state[f"decoder.class_heads.0.{kind}"]
        state[f"decoder.class_heads.0.{kind}"] = head[:-1]
        state[f"decoder.class_heads.0.no_object.{kind}"] = head[-1:]
    return move(state, "query_embed.", "query_selection.position.")


def from_dab_detr(state: State) -> State:
    """Convert DAB-DETR and DN-DETR.

    The last row of DN-DETR's label embedding is the content of its matching queries.
    """
    state = _convert(state, _DAB)
    if LABELS in state:
        state["query_selection.content.weight"] = state[LABELS][-1:]
    return with_empty_slot(state, unused=1)


def from_deformable_detr(state: State) -> State:
    """Convert Deformable DETR and its variants, DAB- and DN-Deformable-DETR."""
    state = _convert(with_levels(state), _DEFORMABLE)
    if "query_embed.weight" in state:
        position, content = state.pop("query_embed.weight").chunk(2, 1)
        state["query_selection.position.weight"] = position
        state["query_selection.content.weight"] = content
    return with_empty_slot(share_heads(with_encoder_heads(state)), unused=1)


def _convert(state: State, layers: str) -> State:
    # Heads that refine boxes are there twice.
    state = {
        key: x
        for key, x in state.items()
        if not re.match(r"transformer\.decoder\.(class|bbox)_embed\.", key)
    }
    # One head for all layers, and one level.
    state = move(state, "class_embed.weight", "class_embed.0.weight")
    state = move(state, "class_embed.bias", "class_embed.0.bias")
    state = move(state, "bbox_embed.layers.", "bbox_embed.0.layers.")
    state = move(state, "input_proj.weight", "input_proj.0.0.weight")
    state = move(state, "input_proj.bias", "input_proj.0.0.bias")
    return rename(state, _TRANSFORMER + layers + _REST)
