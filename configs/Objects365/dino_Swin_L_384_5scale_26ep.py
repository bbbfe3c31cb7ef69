# Swin-L on Objects365 as in the paper's section 4.2 and appendix: 26 epochs, batch size 64, more
# denoising. An epoch is 1,742,286 images or 27,223 iterations. The paper does not say when the
# learning rate drops; in EasyCV it does after 24 epochs.
from ..dino_Swin_L_384_5scale_12ep import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset.names = ["objects365_v2_train"]
dataloader.train.total_batch_size = 64
dataloader.test.dataset.names = ["objects365_v2_val"]

model.denoising.budget = 1000
model.activation_checkpointing = ["backbone", "encoder", "decoder"]

train.max_iter = 26 * 27223
train.reference_batch = 64
train.eval_period = 27223
train.checkpointer.update(period=6806, max_to_keep=10)
train.amp.enabled = True
lr_multiplier.milestones = [24]
lr_multiplier.num_updates = 26
