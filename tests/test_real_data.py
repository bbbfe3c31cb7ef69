"""Real photographs and a real backbone, where they are at hand: in a folder beside the project."""

import pickle
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import (
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.modeling import build_model

from dino_d2 import data
from dino_d2.weights import model_zoo

SHARED = Path(__file__).parents[2] / "shared"
BCCD, COCO = SHARED / "data" / "bccd", SHARED / "data" / "coco_tiny"
R_50 = SHARED / "weights" / "R-50_msra_fp16.pkl"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"there is no {SHARED}")


def dataset(folder, split):
    return f"{folder}/{split}.json@{folder}/images"


def small_dino(*overrides):
    cfg = model_zoo.get_config("quickstart")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
    return build_model(cfg)


@pytest.mark.parametrize(
    ("folder", "splits", "classes"),
    [(BCCD, ("trainval", "test"), 3), (COCO, ("train", "val"), 80)],
    ids=["bccd", "coco_tiny"],
)
def test_the_files_pass_the_checks(folder, splits, classes):
    train, test = (dataset(folder, split) for split in splits)
    data.check([train], [test], classes)


def test_images_without_boxes_are_kept_and_crowds_are_not_trained_on():
    name = dataset(COCO, "train")
    data.register([name])
    records = get_detection_dataset_dicts([name], filter_empty=False)
    assert len(records) == 32
    assert sum(not record["annotations"] for record in records) == 2
    crowds = [r for r in records if any(a["iscrowd"] for a in r["annotations"])]
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    for record in crowds:
        trained_on = [a for a in record["annotations"] if not a["iscrowd"]]
        assert len(mapper(record)["instances"]) == len(trained_on) < len(record["annotations"])
    assert crowds


@pytest.mark.slow
def test_an_epoch_of_coco_trains_with_finite_losses():
    name = dataset(COCO, "train")
    data.register([name])
    loader = build_detection_train_loader(
        dataset=get_detection_dataset_dicts([name], filter_empty=False),
        mapper=DatasetMapper(
            is_train=True,
            augmentations=data.detr_augmentation(min_sizes=(96, 128), max_size=213, crop_size=None),
            image_format="RGB",
        ),
        total_batch_size=4,
        aspect_ratio_grouping=False,
    )
    model = small_dino("MODEL.DINO.NUM_CLASSES", 80)
    for _, batch in zip(range(8), loader, strict=False):
        losses = model(batch)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_imagenet_backbone_is_loaded_whole():
    cfg = model_zoo.get_config("dino_R_50_4scale_12ep")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RESNETS.STRIDE_IN_1X1", True])
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(R_50))
    weights = pickle.loads(R_50.read_bytes(), encoding="latin1")["model"]
    backbone = model.backbone.state_dict()
    assert weights.keys() == backbone.keys()
    assert all((backbone[k] == torch.as_tensor(x)).all() for k, x in weights.items())
