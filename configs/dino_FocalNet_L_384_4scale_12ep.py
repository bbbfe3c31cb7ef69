from .dino_FocalNet_T_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.name = "focalnet_large_fl3"
model.backbone.options.drop_path_rate = 0.2
train.init_checkpoint = (
    "https://huggingface.co/timm/focalnet_large_fl3.ms_in22k/resolve/main/model.safetensors"
)
