from .dino_ConvNeXt_T_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.name = "focalnet_tiny_lrf"
model.backbone.options.drop_path_rate = 0.1
train.init_checkpoint = (
    "https://huggingface.co/timm/focalnet_tiny_lrf.ms_in1k/resolve/main/model.safetensors"
)
