# For mmdetection's checkpoint: as detrex's, but with the paper's position encoding.
from ..detrex.dino_Swin_L_384_5scale_36ep import dataloader, lr_multiplier, model, optimizer, train

model.encoder.update(position_temperature=20.0, position_offset=0.0)
