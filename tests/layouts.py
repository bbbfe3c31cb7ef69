"""State dicts of a DINO in the layouts of its other implementations, for the tests of loading.

Written out by hand from the names in their files, and the other way round than dino_d2.checkpoint,
so that a slip there is not repeated here.
"""

import torch

# ours, official, detrex, mmdetection
ENCODER_LAYER = """
self_attn    self_attn  attentions.0       self_attn
ffn.layers.0 linear1    ffns.0.layers.0.0  ffn.layers.0.0
ffn.layers.1 linear2    ffns.0.layers.1    ffn.layers.1
norm1        norm1      norms.0            norms.0
norm2        norm2      norms.1            norms.1
"""
DECODER_LAYER = """
self_attn    self_attn  attentions.0.attn  self_attn.attn
cross_attn   cross_attn attentions.1       cross_attn
ffn.layers.0 linear1    ffns.0.layers.0.0  ffn.layers.0.0
ffn.layers.1 linear2    ffns.0.layers.1    ffn.layers.1
norm1        norm2      norms.0            norms.0
norm2        norm1      norms.1            norms.1
norm3        norm3      norms.2            norms.2
"""
REST = """
encoder.level_embed.weight  level_embed           level_embeds      level_embed
query_selection.memory_proj enc_output            enc_output        memory_trans_fc
query_selection.memory_norm enc_output_norm       enc_output_norm   memory_trans_norm
query_selection.content     tgt_embed             tgt_embed         query_embedding
decoder.norm                decoder.norm          decoder.norm      decoder.norm
"""
OFFICIAL, DETREX, MMDET = 1, 2, 3


def official(state):
    """As IDEA-Research/DINO writes it: heads under twelve names, an unused last label."""
    levels = sum(key.startswith("neck.projections.") for key in state) // 4
    result = rename(state, OFFICIAL, "transformer.", backbone="backbone.0.")
    result |= neck(state, lambda kind, i, part: f"input_proj.{i + levels * (kind > 0)}.{part}.")
    head = "transformer.enc_out_{}_embed."
    result |= moved(state, "query_selection.class_head.", head.format("class"))
    result |= moved(state, "query_selection.box_head.", head.format("bbox"))
    result |= decoder_heads(state, extra=False)
    labels = state["denoising.label_embed.weight"].clone()
    labels[-1] = torch.randn(labels.shape[1])
    return result | {"label_enc.weight": labels}


def detrex(state):
    """As IDEA-Research/detrex writes it: the encoder's heads count as those of one more layer."""
    result = rename(state, DETREX, "transformer.", backbone="backbone.")
    result |= neck(state, convs(norm="norm"))
    result |= decoder_heads(state, extra=True)
    return result | {"label_enc.weight": state["denoising.label_embed.weight"][:-1]}


def mmdet(state):
    """As mmdetection 3 writes it: no bias in the neck, heads without a second name."""
    result = rename(state, MMDET, "", backbone="backbone.")
    neck_state = neck(state, convs(norm="gn"))
    result |= {k: x for k, x in neck_state.items() if not k.endswith("conv.bias")}
    number = num_layers(state, "decoder")
    for i, (class_head, box_head) in enumerate(heads(state, number, extra=True)):
        result |= moved(state, class_head, f"bbox_head.cls_branches.{i}.")
        for ours, theirs in enumerate((0, 2, 4)):  # ReLUs are counted in between
            branch = f"bbox_head.reg_branches.{i}.{theirs}."
            result |= moved(state, f"{box_head}layers.{ours}.", branch)
    labels = state["denoising.label_embed.weight"][:-1]
    return result | {"dn_query_generator.label_embedding.weight": labels}


def rename(state, column, prefix, *, backbone):
    """What is no head, no part of the neck and no label embedding."""
    result = moved(state, "backbone.", backbone)
    for stage, table in (("encoder", ENCODER_LAYER), ("decoder", DECODER_LAYER)):
        for i in range(num_layers(state, stage)):
            for line in table.strip().splitlines():
                names = line.split()
                layer = f"{stage}.layers.{i}."
                result |= moved(state, layer + names[0], prefix + layer + names[column])
    for line in REST.strip().splitlines():
        names = line.split()
        result |= moved(state, names[0], prefix + names[column])
    return result | moved(state, "decoder.position_head.mlp.", f"{prefix}decoder.ref_point_head.")


def neck(state, name):
    """`name(kind, i, part)`, kind: projection or downsample, part: convolution or norm."""
    result = {}
    for kind, ours in enumerate(("projections", "downsamples")):
        for i in range(5):
            for part in (0, 1):
                result |= moved(state, f"neck.{ours}.{i}.{part}.", name(kind, i, part))
    return result


def convs(norm):
    return lambda kind, i, part: (
        f"neck.{('convs', 'extra_convs')[kind]}.{i}.{('conv', norm)[part]}."
    )


def decoder_heads(state, *, extra):
    """Under both names that the official one and detrex have for them."""
    result = {}
    for prefix in ("transformer.decoder.", ""):
        for i, (class_head, box_head) in enumerate(
            heads(state, num_layers(state, "decoder"), extra)
        ):
            result |= moved(state, class_head, f"{prefix}class_embed.{i}.")
            result |= moved(state, box_head, f"{prefix}bbox_embed.{i}.")
    return result


def heads(state, number, extra):
    """Our names of the class and the box head of every layer, and of one more: the encoder."""
    shared = "decoder.class_heads.1.bias" not in state
    pairs = [
        (f"decoder.class_heads.{i}.", f"decoder.box_heads.{i}.")
        for i in ([0] * number if shared else range(number))
    ]
    encoder = ("query_selection.class_head.", "query_selection.box_head.")
    return [*pairs, encoder] if extra else pairs


def num_layers(state, stage):
    return len({key.split(".")[2] for key in state if key.startswith(f"{stage}.layers.")})


def moved(state, prefix, new):
    """The tensors whose names begin with `prefix`, with `new` in its place."""
    return {new + k[len(prefix) :]: x for k, x in state.items() if k.startswith(prefix)}
