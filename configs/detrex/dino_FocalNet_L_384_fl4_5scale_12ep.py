from .dino_FocalNet_L_384_fl4_4scale_12ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.out_features = ["p2", "p3", "p4", "p5"]
model.encoder.num_levels = 5
