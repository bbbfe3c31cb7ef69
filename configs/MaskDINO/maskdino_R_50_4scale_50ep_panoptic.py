# Panoptic segmentation of COCO (53.0 PQ and 60.6 mIoU as published; 48.8 and 44.3 AP of boxes and
# masks, which the README of the authors' code seems to have swapped). There it is
# panoptic-segmentation/maskdino_R50_bs16_50ep_3s_dowsample1_2048.
from ..common.segmentation import evaluator, stuff_classes
from .maskdino_R_50_4scale_50ep import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset.names = ["coco_2017_train_panoptic"]
dataloader.test.dataset.names = ["coco_2017_val_panoptic"]
dataloader.evaluator = evaluator
model.query_selection.initialize_box_type = "no"
model.update(panoptic_on=True, semantic_on=True, stuff_classes=stuff_classes)
train.best_metric = "panoptic_seg/PQ"
