# Semantic segmentation of ADE20K, maskdino_R50_bs16_160k_steplr of its authors' code (48.7 mIoU as
# published): learned queries, and softmax class scores. Sizes and crops are those of
# Mask2Former's config; its colour augmentation is left out.
from detectron2.config import LazyCall as L

from dino_d2.modeling import SoftmaxLoss, StaticQueries

from ..common.segmentation import evaluator
from .maskdino_R_50_50ep import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset.names = ["ade20k_sem_seg_train"]
dataloader.train.mapper.augmentations.update(
    min_sizes=[int(51.2 * x) for x in range(5, 21)],
    max_size=2048,
    scale_jitter=[],
    further=[["RandomCrop", {"crop_type": "absolute", "crop_size": [512, 512]}]],
)
dataloader.test.dataset.names = ["ade20k_sem_seg_val"]
dataloader.test.mapper.augmentations[0].update(short_edge_length=512, max_size=2048)
dataloader.evaluator = evaluator
model.query_selection = L(StaticQueries)(
    num_queries=100, embed_dim="${..encoder.embed_dim}", num_classes="${..num_classes}"
)
model.decoder.softmax = True
model.criterion.class_loss = L(SoftmaxLoss)()
model.update(instance_on=False, semantic_on=True)
lr_multiplier.update(milestones=[135000, 150000], num_updates=160000)
train.update(max_iter=160000, best_metric="sem_seg/mIoU")
