from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from dino_d2.modeling.backbones import ViT, ViTDet

from .dino_R_50 import model

# ViT-B; blocks 2, 5, 8 and 11 attend to all of the image, the others within windows. Images
# are padded to the largest of their batch, as with other backbones; detrex has square_pad=1024.
model.backbone = L(ViTDet)(
    net=L(ViT)(
        img_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.1,
        window_size=14,
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
        use_rel_pos=True,
        pretrain_img_size=224,
    ),
    in_feature="last_feat",
    out_channels=256,
    scale_factors=[2.0, 1.0, 0.5],
    top_block=L(LastLevelMaxPool)(),
)
model.neck.in_features = ["p3", "p4", "p5", "p6"]
model.neck.input_shape = {
    f"p{i}": L(ShapeSpec)(channels="${....backbone.out_channels}") for i in range(3, 7)
}
