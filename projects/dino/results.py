"""Detections in COCO's results format."""

from collections.abc import Sequence
from pathlib import Path

from detectron2.structures import BoxMode, Instances

from dino_d2.checkpoint import COCO_80, COCO_91
from dino_d2.data.coco_faults import read
from dino_d2.names import nearest, nearest_path


def read_annotations(file: Path) -> dict:
    """
    Raises:
        FileNotFoundError: there is no such file; names the nearest
        DatasetError: it has no COCO annotations
    """
    near = "" if file.exists() else nearest_path(str(file))
    if near:
        raise FileNotFoundError(f"--annotations '{file}' does not exist; the nearest: '{near}'")
    return read(str(file))


def image_ids(paths: Sequence[Path], annotations: dict | None) -> list[int]:
    """Those of the annotations, by the longest end of the path that they name; or numbers from 1.

    Raises:
        ValueError: an image is not among those of the annotations
    """
    if not annotations:
        return list(range(1, len(paths) + 1))
    known = {x["file_name"]: x["id"] for x in annotations["images"]}
    ids = []
    for path in paths:
        ends = (Path(*path.parts[i:]).as_posix() for i in range(len(path.parts)))
        name = next((end for end in ends if end in known), None)
        if name is None:
            near = ", ".join(nearest(path.name, known)) or "none"
            raise ValueError(f"'{path}' is no image of the annotations; the nearest: {near}")
        ids.append(known[name])
    return ids


def category_ids(classes: Sequence[str], annotations: dict | None) -> list[int]:
    """Those of the annotations, by name; or COCO's for its classes, or numbers from 1.

    Raises:
        ValueError: a class is not among those of the annotations
    """
    if not annotations:
        is_coco = list(classes) == list(COCO_80)
        return [COCO_91.index(x) if is_coco else i for i, x in enumerate(classes, start=1)]
    known = {x["name"]: x["id"] for x in annotations["categories"]}
    for name in classes:
        if name not in known:
            near = ", ".join(nearest(name, known) or known)
            raise ValueError(
                f"the model's class '{name}' is no category of the annotations; the nearest: {near}"
            )
    return [known[name] for name in classes]


def to_results(
    names: dict, instances: Instances, classes: Sequence[str], categories: Sequence[int]
) -> list[dict]:
    """
    Args:
        names: what tells the image: image_id, and others that go along
        instances: with pred_boxes in pixels, scores and pred_classes
        classes, categories: name and id of each class
    """
    boxes = instances.pred_boxes.tensor
    boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    scores, labels = instances.scores.tolist(), instances.pred_classes.tolist()
    return [
        {
            **names,
            "category_id": categories[label],
            "category": classes[label],
            "bbox": box,
            "score": score,
        }
        for box, score, label in zip(boxes, scores, labels, strict=True)
    ]
