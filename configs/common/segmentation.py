# For Mask DINO with maps: the evaluator, and the stuff classes of the data.
from detectron2.config import LazyCall as L

from dino_d2.data import stuff_classes as stuff_classes_of
from dino_d2.engine.evaluator import segmentation_evaluator

evaluator = L(segmentation_evaluator)(
    dataset_name="${dataloader.test.dataset.names[0]}",
    output_dir="${train.output_dir}/inference",
    instance_on="${model.instance_on}",
    panoptic_on="${model.panoptic_on}",
    semantic_on="${model.semantic_on}",
)
stuff_classes = L(stuff_classes_of)(names="${dataloader.train.dataset.names}")
