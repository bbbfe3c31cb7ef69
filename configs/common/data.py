from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from omegaconf import OmegaConf

from dino_d2.data import (
    Mapper,
    Mixing,
    ResizeShortestEdge,
    build_train_loader,
    detr_augmentation,
)
from dino_d2.engine.evaluator import ErrorAnalysisEvaluator

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names=["coco_2017_train"], filter_empty=False),
    mapper=L(Mapper)(
        is_train=True,
        augmentations=L(detr_augmentation)(
            min_sizes=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
            max_size=1333,
            crop_min_sizes=[400, 500, 600],
            crop_size=[384, 600],
            flip="horizontal",
            scale_jitter=[],
            photometric=0.0,
            further=[],
        ),
        min_visible=0.0,
        image_format="RGB",
    ),
    total_batch_size=16,
    num_workers=4,
)

dataloader.mixing = L(Mixing)(mosaic=0.0, mixup=0.0, span=[0.05, 0.5], min_visible=0.0)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names=["coco_2017_val"], filter_empty=False),
    mapper=L(Mapper)(
        is_train=False,
        augmentations=[L(ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(ErrorAnalysisEvaluator)(
    dataset_name="${..test.dataset.names[0]}",
    output_dir="${train.output_dir}/inference",
)
