from dino_d2.modeling import StaticQueries

from .dino_R_50_4scale_12ep_dn_once import dataloader, lr_multiplier, model, optimizer, train

model.query_selection._target_ = StaticQueries
