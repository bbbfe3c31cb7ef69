from .dino_R_50_4scale_12ep_dn import dataloader, lr_multiplier, model, optimizer, train

model.decoder.look_forward = 1
