from .dino_Swin_L_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(embed_dim=128, num_heads=[4, 8, 16, 32])
for i in range(4):
    model.neck.input_shape[f"p{i}"].channels = 128 * 2**i
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_base_patch4_window12_384_22kto1k.pth"
)
