from dino_d2.modeling import Denoising

from ..dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.denoising._target_ = Denoising
