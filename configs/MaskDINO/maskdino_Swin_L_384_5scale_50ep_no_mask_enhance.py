# Decoding starts from boxes of the box head (52.1 mask AP and 58.3 box AP as published). In its
# authors' code it is swin/maskdino_R50_bs16_50ep_4s_dowsample1_2048_no_maskEnhance; its README
# names the config with boxes of masks.
from .maskdino_Swin_L_384_5scale_50ep import dataloader, lr_multiplier, model, optimizer, train

model.query_selection.initialize_box_type = "no"
