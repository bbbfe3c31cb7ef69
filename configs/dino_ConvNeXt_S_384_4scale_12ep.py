from .dino_ConvNeXt_T_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.name = "convnext_small"
train.init_checkpoint = "https://dl.fbaipublicfiles.com/convnext/convnext_small_22k_1k_384.pth"
