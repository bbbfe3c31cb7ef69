from ..dino_R_50_4scale_24ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.shared_heads = False
