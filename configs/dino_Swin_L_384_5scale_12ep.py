from .dino_Swin_L_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.out_indices = [0, 1, 2, 3]
model.neck.in_features = ["p0", "p1", "p2", "p3"]
model.encoder.num_levels = 5
