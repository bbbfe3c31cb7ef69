from .dino_Swin_L_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(
    embed_dim=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    pretrain_img_size=224,
    drop_path_rate=0.1,
)
for i in range(4):
    model.neck.input_shape[f"p{i}"].channels = 96 * 2**i
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_tiny_patch4_window7_224.pth"
)
