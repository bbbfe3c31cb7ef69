# DAB-Deformable-DETR with queries from the encoder's proposals, as in detrex: 49.7 AP there.
from dino_d2.modeling import PureQuerySelection

from .dab_deformable_detr_R_50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.query_selection._target_ = PureQuerySelection
model.decoder.size_bias = 0.0
model.max_detections = 300
