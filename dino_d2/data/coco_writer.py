"""Writes detections in COCO's results format, which `coco_results` reads."""

from collections.abc import Sequence
from pathlib import Path

from detectron2.structures import BoxMode, Instances

from ..names import hint
from .coco_classes import COCO_80, COCO_91
from .masks import encode_mask
from .normalise import fold_name


def image_ids(paths: Sequence[Path], annotations: dict[str, list] | None) -> list[int]:
    """Image ids of the annotations, by the longest matching end of the path; or numbers from 1.

    Raises:
        ValueError: an image is not in the annotations, or two paths match the same image
    """
    if not annotations:
        return list(range(1, len(paths) + 1))
    known = {x["file_name"]: x["id"] for x in annotations["images"]}
    alike: dict[str, list[str]] = {}
    for name in known:
        alike.setdefault(fold_name(name), []).append(name)
    found: dict[int, Path] = {}
    for path in paths:
        ends = [Path(*path.parts[i:]).as_posix() for i in range(len(path.parts))]
        name = next((end for end in ends if end in known), None)
        if name is None:  # a unique one that differs only in case or Unicode normal form
            names = next((alike[fold_name(end)] for end in ends if fold_name(end) in alike), ())
            name = names[0] if len(names) == 1 else None
        if name is None:
            raise ValueError(f"'{path}' is not in the annotations; {hint(path.name, known)}")
        other = found.setdefault(known[name], path)
        if other is not path:
            raise ValueError(
                f"'{other}' and '{path}' would both be '{name}' of the annotations: leave out one"
            )
    return list(found)


def category_ids(classes: Sequence[str], annotations: dict[str, list] | None) -> list[int]:
    """Category ids of the annotations, by name; a ValueError if one is missing.

    Without annotations, COCO's for its classes, or numbers from 1.
    """
    if not annotations:
        is_coco = list(classes) == list(COCO_80)
        return [COCO_91.index(x) if is_coco else i for i, x in enumerate(classes, start=1)]
    known = {x["name"]: x["id"] for x in annotations["categories"]}
    for name in classes:
        if name not in known:
            raise ValueError(
                f"the model's class '{name}' is not in the annotations; {hint(name, known)}"
            )
    return [known[name] for name in classes]


def to_results(
    names: dict, instances: Instances, classes: Sequence[str], categories: Sequence[int]
) -> list[dict]:
    """The detections in an image, in the format of `read_results`.

    Args:
        names: image_id, and other keys to copy into every detection
        instances: with pred_boxes in pixels, scores, pred_classes and possibly pred_masks and
            track_ids (-1: of no track)
        classes, categories: name and id of each class
    """
    masks: list[dict] = [{}] * len(instances)
    if instances.has("pred_masks"):
        masks = [{"segmentation": encode_mask(x)} for x in instances.pred_masks.numpy()]
    tracks: list[dict] = [{}] * len(instances)
    if instances.has("track_ids"):
        tracks = [{"track_id": x} if x >= 0 else {} for x in instances.track_ids.tolist()]
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
            **mask,
            **track,
        }
        for box, score, label, mask, track in zip(boxes, scores, labels, masks, tracks, strict=True)
    ]
