# The improved recipe of detrex and mmdetection.
from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.freeze_at = 0
model.denoising.budget = 300
model.criterion.update(class_weight=2.0, denoising_class_weight=1.0)
optimizer.lr = 2e-4
optimizer.params.offsets_multiplier = 0.1
train.ema.enabled = True
