from ..dino_FocalNet_L_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.shared_heads = False
model.encoder.update(position_temperature=10000.0, position_offset=-0.5)
