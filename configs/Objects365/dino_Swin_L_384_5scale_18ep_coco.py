# COCO after Objects365: 18 epochs of images 1.5 times as large. The step of the learning rate is
# from EasyCV, as the paper does not give it.
from ..dino_Swin_L_384_5scale_12ep import dataloader, lr_multiplier, model, optimizer, train

augmentations = dataloader.train.mapper.augmentations
augmentations.min_sizes = [720, 768, 816, 864, 912, 960, 1008, 1056, 1104, 1152, 1200]
augmentations.max_size = 2000
augmentations.crop_min_sizes = [600, 750, 900]
augmentations.crop_size = [576, 900]
dataloader.test.mapper.augmentations[0].update(short_edge_length=1200, max_size=2000)

model.denoising.budget = 1000
model.activation_checkpointing = ["backbone", "encoder", "decoder"]

train.init_checkpoint = "output/objects365/model_final.pth"  # of the config beside this one
train.max_iter = 18 * 7393
train.amp.enabled = True
lr_multiplier.milestones = [8]
lr_multiplier.num_updates = 18
