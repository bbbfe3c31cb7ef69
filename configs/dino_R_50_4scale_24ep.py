from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.max_iter = 24 * 7393
lr_multiplier.milestones = [20]
lr_multiplier.num_updates = 24
