"""Masks in data: what is read, what is repaired, and what training gets."""

import csv
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from PIL import Image

from dino_d2.data import Mapper, register
from dino_d2.data.masks import decode_mask, encode_mask
from dino_d2.engine.evaluator import ErrorAnalysisEvaluator

SQUARE = [8, 8, 24, 8, 24, 24, 8, 24]
PIXELS = np.zeros((40, 60), bool)
PIXELS[8:24, 8:24] = True
COUNTS = [8 * 40 + 8, *[16, 24] * 15, 16, 16 + 36 * 40]


@pytest.fixture
def name_of(tmp_path, clean_catalogs):
    """Registers an image of 40 x 60 with boxes that have these masks; None: there is no key."""

    def write(*masks, crowd=(), file="a"):
        Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
        annotations = [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": [8, 8, 16, 16], "area": 256}
            | {"iscrowd": int(i - 1 in crowd)}
            | ({} if mask is None else {"segmentation": mask})
            for i, mask in enumerate(masks, start=1)
        ]
        dataset = {
            "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "thing"}],
        }
        (tmp_path / f"{file}.json").write_text(json.dumps(dataset))
        name = f"{tmp_path}/{file}.json@{tmp_path}"
        register([name])
        return name

    return write


def masks_in(name):
    (record,) = DatasetCatalog.get(name)
    return [x.get("segmentation") for x in record["annotations"]]


def mapped(name, *augmentations, **options):
    mapper = Mapper(
        is_train=True,
        augmentations=list(augmentations),
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        **options,
    )
    (record,) = DatasetCatalog.get(name)
    return mapper(record)["instances"]


@pytest.mark.parametrize(
    "mask",
    [
        [SQUARE],
        SQUARE,  # one polygon without a list around it
        [SQUARE, [1, 1, 2, 2]],  # a part that is none
        [list(map(str, SQUARE))],
        encode_mask(PIXELS),
        {"size": [40, 60], "counts": COUNTS},
    ],
    ids=["polygon", "flat", "with a line", "of text", "RLE", "uncompressed RLE"],
)
def test_masks_of_any_form_are_read(name_of, mask):
    (found,) = masks_in(name_of(mask))
    assert np.array_equal(decode_mask(found, PIXELS.shape), PIXELS)
    assert torch.equal(mapped(name_of(mask, file="b")).gt_masks.tensor[0], torch.tensor(PIXELS))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[8, 8, 24, 24]], "parts of masks that are no polygon"),
        ([SQUARE[:-1]], "parts of masks that are no polygon"),
        ([[*SQUARE[:-1], None]], "parts of masks that are no polygon"),
        ([[*SQUARE[:-1], float("nan")]], "parts of masks that are no polygon"),
        ([["a"] * 8], "parts of masks that are no polygon"),
        (encode_mask(PIXELS.T), "masks in RLE that is damaged or of another size"),
        ({"size": [40, 60], "counts": [1, 2]}, "masks in RLE that is damaged"),
        ({"size": [40, 60], "counts": None}, "masks in RLE that is damaged"),
        ({"counts": COUNTS}, "masks in RLE that is damaged"),
        ([], "annotations without a usable mask"),
        (None, "annotations without a usable mask"),
    ],
)
def test_what_is_no_mask_is_left_out_and_its_box_kept(name_of, caplog, mask, said):
    with caplog.at_level(logging.WARNING):
        found = masks_in(name_of([SQUARE], mask, mask))
    assert found == [[SQUARE], None, None]
    assert any(said in x and ": 2, the first is annotation 2" in x for x in caplog.messages)
    assert "annotations without a usable mask, of which the box alone is used: 2" in caplog.text


def test_a_dataset_of_boxes_says_nothing_of_masks(name_of, caplog):
    with caplog.at_level(logging.WARNING):
        assert masks_in(name_of(None, [], None)) == [None] * 3
    assert "mask" not in caplog.text


def test_a_box_without_a_mask_is_augmented_and_told_apart(name_of):
    crop = T.CropTransform(16, 0, 44, 40)
    instances = mapped(name_of([SQUARE], None), crop, recompute_boxes=True)
    assert instances.has_mask.tolist() == [True, False]
    assert instances.gt_boxes.tensor.tolist() == [[0, 8, 8, 24]] * 2


def test_crowds_are_left_out_and_an_image_of_crowds_is_empty(name_of):
    assert len(mapped(name_of([SQUARE], [SQUARE], crowd=[1]))) == 1
    nothing = mapped(name_of([SQUARE], crowd=[0], file="b"), recompute_boxes=True)
    assert len(nothing) == 0 and len(nothing.has_mask) == 0


def test_without_masks_nothing_of_them_is_read(name_of):
    mapper = Mapper(is_train=True, augmentations=[], image_format="RGB")
    (record,) = DatasetCatalog.get(name_of([SQUARE]))
    assert not mapper(record)["instances"].has("gt_masks")


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    ("masks", "tasks", "said"),
    [
        (([SQUARE], [SQUARE]), ["bbox", "segm"], None),
        (([SQUARE], None), ["bbox", "segm"], "1 of 2 annotations of the test set have no mask"),
        ((None, None), ["bbox"], "the test set has no masks"),
    ],
    ids=["all", "some", "none"],
)
def test_masks_are_evaluated_where_there_are_any(name_of, tmp_path, caplog, masks, tasks, said):
    evaluator = ErrorAnalysisEvaluator(name_of(*masks), output_dir=str(tmp_path))
    evaluator.reset()
    result = {"image_id": 1, "category_id": 0, "bbox": [8, 8, 16, 16], "score": 0.9}
    rows = [result | {"segmentation": encode_mask(PIXELS)}]
    evaluator._predictions = [{"image_id": 1, "instances": rows}]
    with caplog.at_level(logging.WARNING):
        results = evaluator.evaluate()
    assert [x for x in ("bbox", "segm") if x in results] == tasks
    assert results["bbox"]["AP"] > 50  # one of the two
    if "segm" in tasks:
        assert results["segm"]["AP"] > 50
    assert (said is None) == ("mask" not in caplog.text)
    assert said is None or said in caplog.text


@pytest.mark.usefixtures("without_plots")
def test_errors_of_masks_are_analysed_beside_those_of_boxes(name_of, tmp_path, caplog):
    """The box is right, and of its mask a quarter."""
    evaluator = ErrorAnalysisEvaluator(name_of([SQUARE]), output_dir=str(tmp_path / "out"))
    evaluator.reset()
    part = PIXELS & (np.arange(40) < 16)[:, None] & (np.arange(60) < 16)
    row = {"image_id": 1, "category_id": 0, "bbox": [8, 8, 16, 16], "score": 0.9}
    row["segmentation"] = encode_mask(part)
    evaluator._predictions = [{"image_id": 1, "instances": [row]}]
    with caplog.at_level(logging.INFO):
        results = evaluator.evaluate()
    assert results["dAP"]["localisation"] == 0
    assert results["dAP_segm"]["localisation"] == pytest.approx(100)
    assert "F1" in results and "F1_segm" not in results  # no mask is found
    assert "for masks, 'localisation' costs most: 100.0 AP (mask AP is 0.0)" in caplog.text
    for folder, kind in ((tmp_path / "out", "correct"), (tmp_path / "out/segm", "localisation")):
        with (folder / "errors.csv").open() as file:
            (counts,) = csv.DictReader(file)
        assert (folder / "thresholds.json").exists() and counts[kind] == "1"


@pytest.mark.parametrize(
    "mask", [None, [], [[8, 8, 24, 24]], [["a"] * 6], encode_mask(PIXELS.T), {"counts": 1}, 7]
)
def test_what_is_no_mask_is_drawn_without(mask):
    """Pictures read the annotations of a user as they are."""
    assert decode_mask(mask, PIXELS.shape) is None
    assert np.array_equal(decode_mask(SQUARE, PIXELS.shape), PIXELS)
