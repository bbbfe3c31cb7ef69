# Mask DINO with Swin-L and five levels (52.3 mask AP and 59.0 box AP as published). In its authors'
# code it is instance-segmentation/swin/maskdino_R50_bs16_50ep_4s_dowsample1_2048, R50 by mistake.
from ..common.models.dino_Swin import model as _swin
from .maskdino_R_50_4scale_50ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone = _swin.backbone
model.backbone.update(out_indices=[0, 1, 2, 3], drop_path_rate=0.3)
model.neck.update(input_shape=_swin.neck.input_shape, in_features=["p0", "p1", "p2", "p3"])
model.pixel_embedding.in_feature = "p0"
model.encoder.num_levels = 5
model.query_selection.update(initialize_box_type="bitmask", anchor_sides=[0.8, 0.4, 0.2, 0.1, 0.05])
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_large_patch4_window12_384_22k.pth"
)
