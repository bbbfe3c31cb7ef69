from detectron2.config import LazyCall as L

from dino_d2.modeling.backbones import TimmBackbone, feature_shapes

from .dino_R_50 import model

# Any model of timm; p3 to p5 have strides of 8, 16 and 32 pixels.
model.backbone = L(TimmBackbone)(
    name="convnext_tiny",
    out_features=["p3", "p4", "p5"],
    norm=True,
    options=dict(drop_path_rate=None),
)
model.neck.input_shape = L(feature_shapes)(
    name="${...backbone.name}", options="${...backbone.options}"
)
