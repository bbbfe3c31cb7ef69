from detectron2 import model_zoo

# 7393 iterations are an epoch of COCO: 118,287 images, empty ones included, 16 at a time
train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.max_iter = 12 * 7393
train.eval_period = 7393
train.checkpointer.period = 7393
