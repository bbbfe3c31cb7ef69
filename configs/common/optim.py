from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

from dino_d2.solver import ClippedAdamW, parameter_groups

optimizer = L(ClippedAdamW)(
    params=L(parameter_groups)(  # train_net adds the model
        lr="${..lr}",
        weight_decay="${..weight_decay}",
        norm_weight_decay="${..weight_decay}",
        backbone_multiplier=0.1,
        offsets_multiplier=1.0,
    ),
    max_norm=0.1,
    lr=1e-4,
    weight_decay=1e-4,
)

# In epochs: relative to train.max_iter, whatever that is.
lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[11], num_updates=12)
