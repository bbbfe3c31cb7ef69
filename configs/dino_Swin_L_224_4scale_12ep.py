from .dino_Swin_L_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(window_size=7, pretrain_img_size=224)
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_large_patch4_window7_224_22kto1k.pth"
)
