from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from dino_d2.modeling.swin import SwinTransformer

from .dino_R_50 import model

# Swin-L; a level is a stage, of twice the channels of the one before.
model.backbone = L(SwinTransformer)(
    embed_dim=192,
    depths=[2, 2, 18, 2],
    num_heads=[6, 12, 24, 48],
    window_size=12,
    pretrain_img_size=384,
    drop_path_rate=0.2,
    out_indices=[1, 2, 3],
)
model.neck.input_shape = {
    f"p{i}": L(ShapeSpec)(channels=192 * 2**i, stride=4 * 2**i) for i in range(4)
}
model.neck.in_features = ["p1", "p2", "p3"]
