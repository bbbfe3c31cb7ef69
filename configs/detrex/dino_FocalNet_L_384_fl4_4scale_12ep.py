from .dino_FocalNet_L_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.name = "focalnet_large_fl4"
train.init_checkpoint = (
    "https://huggingface.co/timm/focalnet_large_fl4.ms_in22k/resolve/main/model.safetensors"
)
