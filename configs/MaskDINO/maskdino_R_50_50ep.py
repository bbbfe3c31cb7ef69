# Mask DINO on COCO, maskdino_R50_bs16_50ep_3s of its authors' code (46.1 mask AP and 51.5 box AP as
# published). Batches of 16 for 50 epochs of the images with annotations.
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ..common.data import dataloader
from ..common.models.maskdino_R_50 import model
from ..common.optim import optimizer
from ..common.train import train

dataloader.train.dataset.filter_empty = True
dataloader.train.mapper.update(
    use_instance_mask=True, instance_mask_format="bitmask", recompute_boxes=True
)
dataloader.train.mapper.augmentations.update(crop_size=None, scale_jitter=[0.1, 2.0], max_size=1024)
optimizer.weight_decay = 0.05
optimizer.params.norm_weight_decay = 0.0
optimizer.max_norm = 0.01
lr_multiplier = L(MultiStepParamScheduler)(
    values=[1.0, 0.1, 0.01], milestones=[327778, 355092], num_updates=368750
)
train.update(max_iter=368750, best_metric="segm/AP")
