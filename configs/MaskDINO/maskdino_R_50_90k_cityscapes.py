# Semantic segmentation of Cityscapes, maskdino_R50_bs16_90k_steplr of its authors' code (79.8 mIoU
# as published). BatchNorms of the backbone stay frozen; in Mask2Former's config they are trained.
from .maskdino_R_50_160k_ade20k import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset.names = ["cityscapes_fine_sem_seg_train"]
dataloader.train.mapper.augmentations.update(
    min_sizes=[int(102.4 * x) for x in range(5, 21)],
    max_size=4096,
    further=[["RandomCrop", {"crop_type": "absolute", "crop_size": [512, 1024]}]],
)
dataloader.test.dataset.names = ["cityscapes_fine_sem_seg_val"]
dataloader.test.mapper.augmentations[0].update(short_edge_length=1024, max_size=2048)
lr_multiplier.update(milestones=[80000, 87000], num_updates=90000)
train.update(max_iter=90000, best_metric="sem_seg/IoU")
