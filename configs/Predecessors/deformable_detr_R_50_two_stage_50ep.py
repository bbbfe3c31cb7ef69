# Two-stage Deformable DETR: 46.2 AP in the paper, 46.9 in its code.
from dino_d2.modeling.criterion import AllProposals
from dino_d2.modeling.query_selection import ProposalQueries

from .deformable_detr_R_50_refine_50ep import dataloader, lr_multiplier, model, optimizer, train

model.query_selection._target_ = ProposalQueries
model.query_selection.num_classes = "${..num_classes}"
model.decoder.size_bias = 0.0
model.criterion._target_ = AllProposals
