from .dino_ConvNeXt_T_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.name = "convnext_base"
train.init_checkpoint = "https://dl.fbaipublicfiles.com/convnext/convnext_base_22k_1k_384.pth"
