from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler

from dino_d2.engine.schedule import share_of

from .dino_ViTDet_B_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.update(embed_dim=1024, depth=24, num_heads=16, drop_path_rate=0.4)
# blocks 5, 11, 17 and 23 attend to all of the image
model.backbone.net.window_block_indexes = [i for i in range(24) if i % 6 != 5]
train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_large.pth"

# The warm-up is detrex's. Its milestones lie beyond the end of its training, so that its learning
# rate never drops; here it drops as for all others.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=lr_multiplier,
    warmup_factor=0.001,
    warmup_length=L(share_of)(iterations=250, max_iter="${train.max_iter}"),
)
