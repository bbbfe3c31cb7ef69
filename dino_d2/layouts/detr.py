"""Converts state dicts of DINO's predecessors to ours, by pure functions.

    detr              facebookresearch/detr
    dab_detr          IDEA-Research/DAB-DETR and DN-DETR, with dense attention
    deformable_detr   fundamentalvision/Deformable-DETR, and deformable models of the two above
    detrex_family     the same of IDEA-Research/detrex, as far as they are deformable
    huggingface_*     DETR, DAB-DETR and Deformable DETR of Hugging Face's transformers

They compute the same functions as ours; `dino.py` detects the format.
"""

import re
from collections.abc import Callable

import torch

from .adapt import LABELS
from .backbones import resnet_names
from .dino import DETREX, share_heads, with_empty_slot, with_encoder_heads, with_levels
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
    query_selection.content               transformer.patterns
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
    decoder.layers.#.cross_attn                 transformer.decoder.layers.#.multihead_attn
    decoder.layers.#.self_attn.query_content    transformer.decoder.layers.#.sa_qcontent_proj
    decoder.layers.#.self_attn.query_position   transformer.decoder.layers.#.sa_qpos_proj
    decoder.layers.#.self_attn.key_content      transformer.decoder.layers.#.sa_kcontent_proj
    decoder.layers.#.self_attn.key_position     transformer.decoder.layers.#.sa_kpos_proj
    decoder.layers.#.self_attn.value            transformer.decoder.layers.#.sa_v_proj
    decoder.layers.#.cross_attn.query_content   transformer.decoder.layers.#.ca_qcontent_proj
    decoder.layers.#.cross_attn.query_position  transformer.decoder.layers.#.ca_qpos_proj
    decoder.layers.#.cross_attn.query_sine      transformer.decoder.layers.#.ca_qpos_sine_proj
    decoder.layers.#.cross_attn.key_content     transformer.decoder.layers.#.ca_kcontent_proj
    decoder.layers.#.cross_attn.key_position    transformer.decoder.layers.#.ca_kpos_proj
    decoder.layers.#.cross_attn.value           transformer.decoder.layers.#.ca_v_proj
"""
_DAB = f"""{_DENSE}
    decoder.layers.#.self_attn.output           transformer.decoder.layers.#.self_attn.out_proj
    decoder.layers.#.cross_attn.output          transformer.decoder.layers.#.cross_attn.out_proj
"""
_DEFORMABLE = """
    decoder.layers.#.norm1                transformer.decoder.layers.#.norm2
    decoder.layers.#.norm2                transformer.decoder.layers.#.norm1
"""
_REST = """
    decoder                               transformer.decoder
"""
_DETREX = f"""{DETREX}
    query_selection.anchors               refpoint_embed
    query_selection.content               tgt_embed
    query_selection.reference_points      transformer.reference_points
    query_selection.box_proj              transformer.pos_trans
    query_selection.box_norm              transformer.pos_trans_norm
    decoder.position_head.scale           transformer.decoder.query_scale
    decoder.class_heads                   class_embed
    decoder.box_heads                     bbox_embed
    denoising.label_embed                 label_encoder
    query_embed                           query_embedding
"""

# The authors' names, Hugging Face's.
_HUGGINGFACE = """
    backbone.0.body                       model.backbone.conv_encoder.model._backbone
    backbone.0.body                       model.backbone.conv_encoder.model
    input_proj                            model.input_projection
    input_proj                            model.input_proj
    query_embed                           model.query_position_embeddings
    refpoint_embed                        model.query_refpoint_embeddings
    transformer.encoder.layers.#.linear1  model.encoder.layers.#.fc1
    transformer.encoder.layers.#.linear2  model.encoder.layers.#.fc2
    transformer.encoder.layers.#.norm1    model.encoder.layers.#.self_attn_layer_norm
    transformer.encoder.layers.#.norm2    model.encoder.layers.#.final_layer_norm
    transformer.encoder.layers.#.activation  model.encoder.layers.#.activation_fn
    transformer.decoder.norm              model.decoder.layernorm
    transformer.decoder.layers.#.linear1  model.decoder.layers.#.fc1
    transformer.decoder.layers.#.linear2  model.decoder.layers.#.fc2
    transformer.decoder.layers.#.norm3    model.decoder.layers.#.final_layer_norm
    class_embed                           class_labels_classifier
    bbox_embed                            bbox_predictor
"""
_HF_DETR = """
    transformer.decoder.layers.#.norm1           model.decoder.layers.#.self_attn_layer_norm
    transformer.decoder.layers.#.norm2           model.decoder.layers.#.encoder_attn_layer_norm
    transformer.decoder.layers.#.multihead_attn  model.decoder.layers.#.encoder_attn
"""
_HF_DEFORMABLE = """
    transformer.decoder.layers.#.norm2       model.decoder.layers.#.self_attn_layer_norm
    transformer.decoder.layers.#.norm1       model.decoder.layers.#.encoder_attn_layer_norm
    transformer.decoder.layers.#.cross_attn  model.decoder.layers.#.encoder_attn
"""
_HF_DAB = "".join(
    f"""
    transformer.decoder.layers.#.{theirs}  model.decoder.layers.#.{huggingface}"""
    for theirs, huggingface in (
        ("self_attn.out_proj", "self_attn.self_attn.output_proj"),
        ("norm1", "self_attn.self_attn_layer_norm"),
        ("sa_qcontent_proj", "self_attn.self_attn_query_content_proj"),
        ("sa_qpos_proj", "self_attn.self_attn_query_pos_proj"),
        ("sa_kcontent_proj", "self_attn.self_attn_key_content_proj"),
        ("sa_kpos_proj", "self_attn.self_attn_key_pos_proj"),
        ("sa_v_proj", "self_attn.self_attn_value_proj"),
        ("cross_attn.out_proj", "cross_attn.cross_attn.output_proj"),
        ("norm2", "cross_attn.cross_attn_layer_norm"),
        ("ca_qcontent_proj", "cross_attn.cross_attn_query_content_proj"),
        ("ca_qpos_proj", "cross_attn.cross_attn_query_pos_proj"),
        ("ca_qpos_sine_proj", "cross_attn.cross_attn_query_pos_sine_proj"),
        ("ca_kcontent_proj", "cross_attn.cross_attn_key_content_proj"),
        ("ca_kpos_proj", "cross_attn.cross_attn_key_pos_proj"),
        ("ca_v_proj", "cross_attn.cross_attn_value_proj"),
        ("linear1", "mlp.fc1"),
        ("linear2", "mlp.fc2"),
        ("norm3", "mlp.final_layer_norm"),
        ("activation", "mlp.activation_fn"),
    )
)
_HF_REST = """
    transformer                           model
"""


def from_detr(state: State) -> State:
    """Convert DETR; the last row of its class head is that of no object."""
    state = _convert(state, _DENSE)
    for kind in ("weight", "bias"):
        if f"decoder.class_heads.0.{kind}" not in state:
            continue  # as those that people leave out for other classes
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
    return _deformable(_convert(with_levels(state), _DEFORMABLE))


def from_detrex(state: State) -> State:
    """Convert detrex's Deformable DETR and its variants, DAB- and DN-Deformable-DETR."""
    return _deformable(rename(_without_aliases(state), _DETREX))


def from_huggingface(table: str, convert: Callable[[State], State]) -> Callable[[State], State]:
    """What renames a model of Hugging Face's to its authors' names, and converts it from there."""

    def convert_huggingface(state: State) -> State:
        state = rename(state, f"{_HUGGINGFACE}{table}{_HF_REST}")
        return convert(_with_joined_projections(state))

    return convert_huggingface


from_huggingface_detr = from_huggingface(_HF_DETR, from_detr)
from_huggingface_dab_detr = from_huggingface(_HF_DAB, from_dab_detr)
from_huggingface_deformable_detr = from_huggingface(_HF_DEFORMABLE, from_deformable_detr)


def _convert(state: State, layers: str) -> State:
    state = _without_aliases(state)
    # One head for all layers, and one level.
    state = move(state, "class_embed.weight", "class_embed.0.weight")
    state = move(state, "class_embed.bias", "class_embed.0.bias")
    state = move(state, "bbox_embed.layers.", "bbox_embed.0.layers.")
    state = move(state, "input_proj.weight", "input_proj.0.0.weight")
    state = move(state, "input_proj.bias", "input_proj.0.0.bias")
    return rename(state, _TRANSFORMER + layers + _REST)


def _deformable(state: State) -> State:
    """Split position and content of the queries, and give the encoder its heads."""
    if "query_embed.weight" in state:
        position, content = state.pop("query_embed.weight").chunk(2, 1)
        state["query_selection.position.weight"] = position
        state["query_selection.content.weight"] = content
    return with_empty_slot(share_heads(with_encoder_heads(state)), unused=1)


def _without_aliases(state: State) -> State:
    """Heads that refine boxes, or propose them, are there twice."""
    pattern = re.compile(r"transformer\.decoder\.(?=(class|bbox)_embed\.)")
    return {pattern.sub("", key): x for key, x in state.items()}


def _with_joined_projections(state: State) -> State:
    """Join the projections of query, key and value, as in PyTorch's attention."""
    joined = dict(state)
    for key in state:
        if match := re.fullmatch(r"(.*attn)\.q_proj\.(weight|bias)", key):
            parts = [joined.pop(f"{match[1]}.{x}_proj.{match[2]}") for x in "qkv"]
            joined[f"{match[1]}.in_proj_{match[2]}"] = torch.cat(parts)
    return joined
