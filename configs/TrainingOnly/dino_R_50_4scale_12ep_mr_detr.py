# With the two extra passes of Mr. DETR (arXiv 2412.10028), and its noise.
from detectron2.config import LazyCall as L

from dino_d2.modeling import InstructedPass, SeparatePass

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.passes = [
    L(InstructedPass)(
        num_classes="${...num_classes}",
        num_layers="${...decoder.num_layers}",
        embed_dim="${...encoder.embed_dim}",
    ),
    L(SeparatePass)(
        num_layers="${...decoder.num_layers}",
        embed_dim="${...encoder.embed_dim}",
        ffn_dim="${...encoder.ffn_dim}",
        dropout="${...encoder.dropout}",
    ),
]
model.denoising.box_noise = 0.4
