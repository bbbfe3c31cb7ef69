# Panoptic segmentation of COCO with Swin-L (58.3 PQ, 50.6 mask AP, 56.2 box AP and 67.5 mIoU as
# published). The README of its authors' code names a config that is not there. This is that of
# panoptic-segmentation/swin/maskdino_R50_bs16_50ep_4s_dowsample1_large_eval; the other one there,
# ..._maskEnhance_2048, has "bitmask" for initialize_box_type.
from ..common.segmentation import stuff_classes
from .maskdino_R_50_4scale_50ep_panoptic import dataloader, lr_multiplier, optimizer
from .maskdino_Swin_L_384_5scale_50ep_no_mask_enhance import model, train

model.update(panoptic_on=True, semantic_on=True, stuff_classes=stuff_classes)
train.best_metric = "panoptic_seg/PQ"
