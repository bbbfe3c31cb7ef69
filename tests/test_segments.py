"""Panoptic and semantic segmentation: ground truth of every pixel, training and evaluation.

The generated shapes are things, and the background is stuff.
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import load_sem_seg
from detectron2.data.datasets.coco_panoptic import register_coco_panoptic
from detectron2.evaluation import CityscapesSemSegEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from dino_d2 import data
from dino_d2.data import DatasetError, Mapper, detr_augmentation, generate, read_label_map
from dino_d2.data.segments import MAPS, NO_CLASS, from_labels, from_segments, segment_ids
from dino_d2.data.shapes import OUTLINES
from dino_d2.engine import evaluation, evaluator, make_plan, run
from dino_d2.weights import model_zoo

CLASSES = [*OUTLINES, "background"]
THINGS = {i + 1: i for i in range(4)}
PANOPTIC = {
    "thing_classes": CLASSES,
    "stuff_classes": CLASSES,
    "thing_dataset_id_to_contiguous_id": THINGS,
    "stuff_dataset_id_to_contiguous_id": {5: 4},
}
EVERYTHING = ["PANOPTIC_ON", "SEMANTIC_ON"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The folder of panoptic shapes: images/, panoptic/ and labels/, and files beside them."""
    root = tmp_path_factory.mktemp("panoptic")
    generate(root, num_train=6, num_val=2)
    for split in ("train", "val"):
        write_maps(root, split)
    return root


def write_maps(root, split):
    """Panoptic PNGs with their JSON, and label maps, of a generated split."""
    content = json.loads((root / f"{split}.json").read_text())
    annotations = []
    for image in content["images"]:
        ids = np.full((image["height"], image["width"]), 1000, np.int64)
        labels = np.full(ids.shape, 4, np.uint8)
        segments = [{"id": 1000, "category_id": 5, "iscrowd": 0}]
        for x in content["annotations"]:
            if x["image_id"] == image["id"]:
                mask = mask_util.decode(x["segmentation"]).astype(bool)
                ids[mask], labels[mask] = 70_000 + x["id"], x["category_id"] - 1
                segments.append({"id": 70_000 + x["id"], "category_id": x["category_id"]})
                segments[-1]["iscrowd"] = 0
        for x in segments:
            x["area"] = int((ids == x["id"]).sum())
        name = f"{image['file_name'].removesuffix('.jpg')}.png"
        save(root / f"panoptic_{split}" / name, ids[..., None] // [1, 256, 256**2] % 256)
        save(root / f"labels_{split}" / name, labels)
        annotations.append({"image_id": image["id"], "file_name": name, "segments_info": segments})
    categories = [{"id": i + 1, "name": x, "isthing": int(i < 4)} for i, x in enumerate(CLASSES)]
    whole = {"images": content["images"], "annotations": annotations, "categories": categories}
    (root / f"panoptic_{split}.json").write_text(json.dumps(whole))


def save(path, array):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


@pytest.fixture
def names(shapes, clean_catalogs):
    """The panoptic data sets, registered by Detectron2."""
    for split in ("train", "val"):
        own = [shapes / x for x in ("images", f"panoptic_{split}", f"panoptic_{split}.json")]
        files = [str(x) for x in (*own, shapes / f"{split}.json")]
        register_coco_panoptic(f"shapes_{split}_panoptic", PANOPTIC, *files)
    return ["shapes_train_panoptic", "shapes_val_panoptic"]


@pytest.fixture
def label_names(shapes, clean_catalogs):
    """The same as label maps."""
    for split in ("train", "val"):
        name, folders = f"shapes_{split}_sem_seg", [f"{shapes}/labels_{split}", f"{shapes}/images"]
        DatasetCatalog.register(name, lambda x=folders, s=split: split_of(load_sem_seg(*x), s))
        metadata = {"evaluator_type": "sem_seg", "ignore_label": NO_CLASS}
        MetadataCatalog.get(name).set(stuff_classes=CLASSES, sem_seg_root=folders[0], **metadata)
    return ["shapes_train_sem_seg", "shapes_val_sem_seg"]


def split_of(records, split):
    return [x for x in records if Path(x["file_name"]).name.startswith(split)]


def make_mapper(*augmentations, **options):
    options = {"use_instance_mask": True, "instance_mask_format": "bitmask"} | options
    return Mapper(True, augmentations=list(augmentations), image_format="RGB", **options)


# ---- ground truth


def test_segments_and_labels_become_instances_with_tight_boxes():
    ids = np.array([[1, 1, 0], [1, 258, 258]])
    png = np.stack([ids % 256, ids // 256, 0 * ids], -1).astype(np.uint8)
    assert (segment_ids(png) == ids).all()
    segments = [
        {"id": 1, "category_id": 7, "isthing": False, "iscrowd": 0},
        {"id": 258, "category_id": 2, "isthing": True, "iscrowd": 0},
        {"id": 9, "category_id": 2, "isthing": True, "iscrowd": 0},  # has no pixels
        {"id": 0, "category_id": 2, "isthing": True, "iscrowd": 1},
    ]
    found = from_segments(ids, segments)
    assert found.gt_classes.tolist() == [7, 2] and found.has_box.tolist() == [False, True]
    assert found.gt_boxes.tensor.tolist() == [[0, 0, 2, 2], [1, 1, 3, 2]]
    assert found.gt_masks.tensor.tolist() == [(ids == 1).tolist(), (ids == 258).tolist()]
    found = from_labels(np.where(ids == 0, NO_CLASS, ids // 256))
    assert found.gt_classes.tolist() == [0, 1] and found.has_box.all()
    assert found.gt_masks.tensor.sum((1, 2)).tolist() == [3, 2]
    assert len(from_labels(np.full((2, 3), NO_CLASS))) == len(from_segments(ids, [])) == 0


def test_maps_are_augmented_with_their_image(names, label_names):
    augmentations = [T.Resize((120, 160)), T.RandomFlip(1.0), T.CropTransform(8, 4, 100, 90)]
    mapper, plain = make_mapper(*augmentations), make_mapper()
    for record, labels in zip(*map(DatasetCatalog.get, (names[0], label_names[0])), strict=True):
        whole, found = plain(record)["instances"], mapper(record)["instances"]
        maps = whole.gt_masks.tensor
        assert (maps.sum(0) == 1).all()  # each pixel is of one segment
        scaled = nn.functional.interpolate(maps[None].float(), (120, 160))[0]
        expected = scaled.flip(2)[:, 4:94, 8:108] > 0
        kept = expected.flatten(1).any(1)
        # Pillow takes the pixel under the centre, and PyTorch the one under the corner.
        agree = (found.gt_masks.tensor == expected[kept]).float().mean()
        assert agree > 0.97 and found.gt_classes.tolist() == whole.gt_classes[kept].tolist()
        assert torch.equal(found.has_box, found.gt_classes < 4)
        boxes = found.gt_masks.get_bounding_boxes().tensor
        assert torch.equal(found.gt_boxes.tensor, boxes)
        (classes, *rest) = mapper(labels)["instances"].gt_classes.tolist(), found.gt_classes
        assert classes == sorted(set(rest[0].tolist()))
        assert "sem_seg" not in mapper(labels) and "segments_info" not in mapper(record)


def test_large_scale_jitter_keeps_images_and_maps_together(names):
    jitter = detr_augmentation(scale_jitter=(0.3, 2.0), max_size=128, crop_size=None)
    mapper = make_mapper(*jitter)
    for record in DatasetCatalog.get(names[0]):
        x = mapper(record)
        assert x["instances"].image_size == tuple(x["image"].shape[1:])
        assert x["instances"].gt_masks.tensor.sum(0).max() <= 1


def test_label_maps_may_have_a_palette(label_names, tmp_path):
    """As those of Pascal VOC, where a grey level would be that of a class's colour."""
    record, path = DatasetCatalog.get(label_names[0])[0], str(tmp_path / "palette.png")
    labels = read_label_map(record["sem_seg_file_name"], np.uint8)
    image = Image.fromarray(labels)
    image.putpalette(np.random.default_rng(0).integers(256, size=768).astype(np.uint8).tobytes())
    image.save(path)
    assert Image.open(path).mode == "P" and (read_label_map(path) == labels).all()
    whole, found = (make_mapper()(x)["instances"] for x in (record, record | {MAPS[1]: path}))
    assert torch.equal(whole.gt_classes, found.gt_classes)
    assert torch.equal(whole.gt_masks.tensor, found.gt_masks.tensor)


def test_classes_that_do_not_exist_are_sentences(tmp_path):
    path = str(tmp_path / "map.png")
    Image.fromarray(np.array([[0, 5, NO_CLASS]], np.uint8)).save(path)
    assert read_label_map(path, num_classes=6).tolist() == [[0, 5, NO_CLASS]]
    with pytest.raises(DatasetError, match=r"map.png' has pixels of class 5, but there are 5 "):
        read_label_map(path, num_classes=5)


def test_unusable_maps_are_sentences(names, label_names, tmp_path):
    for name in (names[0], label_names[0]):
        record = DatasetCatalog.get(name)[0]
        with pytest.raises(DatasetError, match="only a Mask DINO learns"):
            make_mapper(use_instance_mask=False)(record)
        key = "pan_seg_file_name" if "pan_seg_file_name" in record else "sem_seg_file_name"
        save(tmp_path / "small.png", np.zeros((20, 30, 3)))
        with pytest.raises(DatasetError, match="is 30 x 20 pixels, but its image"):
            make_mapper()(record | {key: str(tmp_path / "small.png")})
        with pytest.raises(DatasetError, match=r"'.*gone.png' cannot be read"):
            make_mapper()(record | {key: str(tmp_path / "gone.png")})
    vars(MetadataCatalog.get(label_names[0]))["ignore_label"] = 0
    with pytest.raises(DatasetError, match="marks pixels without a class with 0: write 255"):
        data.check(label_names[:1], (), 5)


def test_classes_are_those_of_the_maps(names, label_names):
    assert data.class_names(names) == data.class_names(label_names) == CLASSES
    assert data.stuff_classes(names) == [4]
    with pytest.raises(DatasetError, match="does not say which classes are things"):
        data.stuff_classes(label_names)
    assert data.stuff_classes("coco_2017_train_panoptic") == list(range(80, 133))
    assert data.num_classes("ade20k_sem_seg_train") == 150
    assert data.num_classes("cityscapes_fine_sem_seg_train") == 19
    assert data.num_classes("coco_2017_train_panoptic_separated") == 80


def test_stuff_has_no_losses_of_boxes_but_counts(make_mask_dino, make_mask_batch):
    model, batch, losses = make_mask_dino(), make_mask_batch(3), []
    for has_box in ([True] * 3, [True, False, True], [False] * 3):
        batch[0]["instances"].has_box = torch.tensor(has_box)
        torch.manual_seed(1)
        losses.append({name: x.item() for name, x in model(batch).items()})
    everything, some, nothing = losses
    for name, loss in everything.items():
        if "bbox" in name or "giou" in name:
            assert 0 == nothing[name] < some[name] < loss
        else:  # matches and divisors are the same
            assert some[name] == nothing[name] == loss


# ---- evaluation


class Perfect(nn.Module):
    """Finds what the maps say."""

    def __init__(self, records):
        super().__init__()
        self.records = {x["file_name"]: x for x in records}

    def forward(self, batch):
        return [self.find(self.records[x["file_name"]]) for x in batch]

    def find(self, record):
        ids = segment_ids(np.asarray(Image.open(record["pan_seg_file_name"])))
        found = from_segments(ids, record["segments_info"])
        masks, labels = found.gt_masks.tensor, found.gt_classes
        things = Instances(found.image_size, pred_boxes=Boxes(found.gt_boxes.tensor))
        things.pred_masks, things.pred_classes = masks, labels
        things.scores = torch.full((len(found),), 0.9)
        segments = [
            {"id": i, "category_id": x, "isthing": x < 4} for i, x in enumerate(labels.tolist(), 1)
        ]
        number = torch.arange(1, len(found) + 1, dtype=torch.int32)[:, None, None]
        sem_seg = torch.stack([masks[labels == k].any(0) for k in range(5)]).float()
        return {
            "instances": things[found.has_box],
            "panoptic_seg": ((masks * number).sum(0).int(), segments),
            "sem_seg": sem_seg,
        }


@pytest.fixture
def panopticapi(monkeypatch):
    """What Detectron2 uses of COCO's panopticapi: colours, and panoptic quality without voids."""
    modules = {x: ModuleType(x) for x in ("panopticapi", "panopticapi.utils")}
    modules["panopticapi.evaluation"] = ModuleType("panopticapi.evaluation")
    modules["panopticapi.utils"].id2rgb = lambda x: (
        np.asarray(x)[..., None] // [1, 256, 256**2] % 256
    ).astype(np.uint8)
    modules["panopticapi.evaluation"].pq_compute = panoptic_quality
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(evaluation, "find_spec", lambda name: name)


def panoptic_quality(gt_json, pred_json, gt_folder, pred_folder):
    truth, found = (json.loads(Path(x).read_text()) for x in (gt_json, pred_json))
    hits, total = {}, {}
    for expected in truth["annotations"]:
        (own,) = [x for x in found["annotations"] if x["image_id"] == expected["image_id"]]
        maps = [
            segment_ids(np.asarray(Image.open(Path(folder, x["file_name"]))))
            for folder, x in ((gt_folder, expected), (pred_folder, own))
        ]
        for x in (*expected["segments_info"], *own["segments_info"]):
            total[x["category_id"]] = total.get(x["category_id"], 0) + 1
        for x in expected["segments_info"]:
            for y in own["segments_info"]:
                masks = maps[0] == x["id"], maps[1] == y["id"]
                iou = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
                if x["category_id"] == y["category_id"] and iou > 0.5:
                    hits.setdefault(x["category_id"], []).append(iou)
    of = {k: 2 * sum(hits.get(k, [])) / number for k, number in total.items()}
    groups = {"All": [*of], "Things": [k for k in of if k < 5], "Stuff": [k for k in of if k == 5]}
    return {
        name: {**dict.fromkeys(("pq", "sq", "rq"), np.mean([of[k] for k in keys])), "n": len(keys)}
        for name, keys in groups.items()
    }


def config(style, train, test, folder, *results):
    cfg = model_zoo.get_config(f"quickstart_masks.{style}")
    if style == "yaml":
        cfg.merge_from_list(["DATASETS.TRAIN", (train,), "DATASETS.TEST", (test,)])
        cfg.merge_from_list(["OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu"])
        cfg.MODEL.DINO.TEST.INSTANCE_ON = "INSTANCE_OFF" not in results
        for name in {*results} - {"INSTANCE_OFF"}:
            cfg.MODEL.DINO.TEST[name] = True
        return cfg
    cfg.dataloader.train.dataset.names, cfg.dataloader.test.dataset.names = [train], [test]
    cfg.train.update(output_dir=str(folder), device="cpu")
    cfg.model.update({name.lower(): True for name in {*results} - {"INSTANCE_OFF"}})
    cfg.model.update(instance_on="INSTANCE_OFF" not in results, num_classes=5, stuff_classes=[4])
    cfg.dataloader.evaluator = {
        "_target_": evaluator.segmentation_evaluator,
        "dataset_name": "${dataloader.test.dataset.names[0]}",
        "output_dir": "${train.output_dir}/inference",
        **{name: f"${{model.{name}}}" for name in evaluation.RESULTS if name in cfg.model},
    }
    return cfg


@pytest.mark.usefixtures("panopticapi", "without_plots")
@pytest.mark.parametrize("style", ["yaml", "py"])
def test_panoptic_data_is_evaluated_by_three_evaluators(style, names, tmp_path):
    told = make_plan(config(style, *names, tmp_path, *EVERYTHING))
    results = told.evaluate(Perfect(DatasetCatalog.get(names[1])))
    assert {"bbox", "segm", "sem_seg", "panoptic_seg"} <= results.keys()
    metrics = {f"{kind}/{name}": x for kind, part in results.items() for name, x in part.items()}
    best = [x for x in told.metrics if not np.isnan(metrics[x]) and metrics[x] != -1]
    assert {"segm/AP", "segm/AP-star", "sem_seg/mIoU", "panoptic_seg/PQ_st"} <= {*best}
    assert [metrics[x] for x in best] == pytest.approx([100.0] * len(best))
    assert not [x for x in told.metrics if x.endswith("AP-background")]


@pytest.mark.parametrize("style", ["yaml", "py"])
def test_label_maps_are_evaluated_by_their_pixels(style, label_names, names, tmp_path):
    told = make_plan(config(style, *label_names, tmp_path, "SEMANTIC_ON", "INSTANCE_OFF"))
    assert told.metrics[0] == "sem_seg/mIoU"
    results = told.evaluate(Perfect(DatasetCatalog.get(names[1])))
    assert results.keys() == {"sem_seg"} and results["sem_seg"]["mIoU"] == pytest.approx(100)
    wrong = MetadataCatalog.get(label_names[1])
    assert wrong.stuff_classes == CLASSES  # the metadata of the data set is left as it is


def test_panoptic_segments_are_read_as_label_maps(names, label_names):
    own = data.with_label_maps(names[1])
    assert data.with_label_maps(label_names[1]) == label_names[1]
    for x, y in zip(*map(DatasetCatalog.get, (own, label_names[1])), strict=True):
        maps = [read_label_map(part["sem_seg_file_name"], dtype=int) for part in (x, y)]
        assert (maps[0] == maps[1]).all()
    everything = THINGS | {5: 4}
    assert MetadataCatalog.get(own).stuff_dataset_id_to_contiguous_id == everything
    assert MetadataCatalog.get(names[1]).stuff_dataset_id_to_contiguous_id == {5: 4}


@pytest.mark.parametrize("style", ["yaml", "py"])
def test_what_an_evaluation_needs_is_said_before_a_training(
    style, names, label_names, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="does not have: set MODEL.DINO.TEST.SEMANTIC_ON"):
        make_plan(config(style, *label_names, tmp_path))
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs panopticapi: pip install git\+https"):
        make_plan(config(style, *names, tmp_path, "PANOPTIC_ON"))
    city = "cityscapes_fine_sem_seg_val"
    with pytest.raises(ValueError, match="pip install cityscapesscripts$"):
        make_plan(config(style, names[0], city, tmp_path, "SEMANTIC_ON"))
    make_plan(config(style, *names, tmp_path, "SEMANTIC_ON"))
    monkeypatch.setattr(CityscapesSemSegEvaluator, "__init__", lambda self, name: None)
    made = evaluator.segmentation_evaluator(city, semantic_on=True)
    assert [type(x) for x in made._evaluators] == [CityscapesSemSegEvaluator]
    results = {"instance_on": False, "panoptic_on": False, "semantic_on": True}
    assert evaluation.metrics_of([city], results)[0] == "sem_seg/IoU"
    vars(MetadataCatalog.get(names[1]))["json_file"] = None
    everything = dict.fromkeys(results, True)
    assert evaluation.metrics_of([names[1]], everything)[0] == "sem_seg/mIoU"


# ---- training


@pytest.mark.slow
@pytest.mark.usefixtures("panopticapi", "without_plots")
@pytest.mark.parametrize("kind", ["panoptic", "sem_seg", "sem_seg by softmax"])
def test_a_mask_dino_trains_on_maps(kind, names, label_names, tmp_path):
    results = EVERYTHING if kind == "panoptic" else ["SEMANTIC_ON", "INSTANCE_OFF"]
    train, test = names if kind == "panoptic" else label_names
    cfg = config("yaml", train, test, tmp_path, *results)
    number = data.check([train], [test], None)
    options = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.REFERENCE_BATCH", 0]
    options += ["MODEL.DINO.NUM_CLASSES", number, "TEST.EVAL_PERIOD", 2, "MODEL.WEIGHTS", ""]
    if "softmax" in kind:
        options += ["MODEL.DINO.QUERY_SELECTION", "StaticQueries"]
        options += ["MODEL.DINO.LOSS.CLASS_LOSS", "SoftmaxLoss", "MODEL.DINO.RELATION", ""]
    metric = "panoptic_seg/PQ" if kind == "panoptic" else "sem_seg/mIoU"
    cfg.merge_from_list([*options, "DATALOADER.NUM_WORKERS", 0, "TEST.BEST_METRIC", metric])
    told = make_plan(cfg)
    assert told.metrics
    run.check(told)
    run.train(told)
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    written = {name: x for line in lines for name, x in json.loads(line).items()}
    assert 0 <= written[metric] <= 100 and (tmp_path / "model_best.pth").is_file()
    assert ("segm/AP" in written) == (kind == "panoptic")
