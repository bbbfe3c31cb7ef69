from .dino_Swin_L_224_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(embed_dim=96, num_heads=[3, 6, 12, 24])
for i in range(4):
    model.neck.input_shape[f"p{i}"].channels = 96 * 2**i
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_small_patch4_window7_224.pth"
)
