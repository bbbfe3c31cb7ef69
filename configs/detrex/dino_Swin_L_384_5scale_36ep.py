from ..dino_Swin_L_384_5scale_36ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.shared_heads = False
model.encoder.update(position_temperature=10000.0, position_offset=-0.5)
