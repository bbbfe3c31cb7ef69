from .dino_Swin_L_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.max_iter = 36 * 7393
lr_multiplier.milestones = [30]
lr_multiplier.num_updates = 36
