from .dino_Swin_S_224_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(depths=[2, 2, 6, 2], drop_path_rate=0.1)
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_tiny_patch4_window7_224.pth"
)
