"""Finds what is wrong with COCO annotations and cannot be repaired."""

import os
from collections.abc import Iterator

MANY = 10  # boxes from which on a majority outside of the images is an error of its own


def faults(dataset: dict[str, list], image_root: str) -> Iterator[str]:
    """Sentences on what is wrong with a dataset, as `normalise` and `place_images` leave it.

    Later ones may follow from the first, so report only that.
    """
    for key in ("images", "categories"):
        if not dataset[key]:
            yield f"there are no {key}: fill the list"
    yield from _name_faults(dataset["categories"])
    yield from image_faults(dataset["images"], image_root)
    yield from _category_faults(dataset)
    yield from _box_faults(dataset)


def _name_faults(categories: list[dict]) -> Iterator[str]:
    ids: dict[str, int] = {}
    for id, name in ((category["id"], category["name"]) for category in categories):
        if not name.strip():
            yield f"category {id} has an empty name: say what it is"
        if name in ids:
            yield f"categories {ids[name]} and {id} are both '{name}': give each its own name"
        ids[name] = id


def image_faults(images: list[dict], image_root: str) -> Iterator[str]:
    """Sentences on a missing image folder or missing files."""
    if not os.path.isdir(image_root):
        yield f"its image folder '{image_root}' does not exist: correct its path"
    if missing := missing_images(images, image_root):
        yield (
            f"{len(missing)} of {len(images)} image files are missing, the first is "
            f"'{os.path.join(image_root, missing[0]['file_name'])}': correct the image folder or "
            "'file_name'"
        )


def missing_images(images: list[dict], image_root: str) -> list[dict]:
    """The images whose file does not exist."""
    paths = [os.path.join(image_root, image["file_name"]) for image in images]
    # List each folder once: checking 118,000 files one by one takes minutes on a network disk.
    folders = {os.path.dirname(path) for path in paths}
    present = {f: set(os.listdir(f)) if os.path.isdir(f) else set() for f in folders}
    pairs = zip(images, paths, strict=True)
    return [x for x, p in pairs if os.path.basename(p) not in present[os.path.dirname(p)]]


def _category_faults(dataset: dict[str, list]) -> Iterator[str]:
    known = {category["id"] for category in dataset["categories"]}
    file_names = {image["id"]: image["file_name"] for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        if annotation["category_id"] not in known:
            yield (
                f"{place_of(annotation, file_names)} has category_id "
                f"{annotation['category_id']}, not in 'categories': correct either"
            )


def _box_faults(dataset: dict[str, list]) -> Iterator[str]:
    """Boxes in another format than [x, y, width, height] in pixels, judged by all of them."""
    annotations = dataset["annotations"]
    if not annotations:
        return
    boxes = [annotation["bbox"] for annotation in annotations]
    wanted = "give [x, y, width, height] in pixels"
    # Integers may be pixels of a tiny image.
    if all(0 <= x <= 1 for box in boxes for x in box) and any(x % 1 for box in boxes for x in box):
        yield f"no box is larger than a pixel, as if they were shares of the image: {wanted}"
    sizes = {image["id"]: (image["width"], image["height"]) for image in dataset["images"]}
    pairs = [(annotation, sizes[annotation["image_id"]]) for annotation in annotations]
    leaving = [(a, limit) for a, limit in pairs if _leaves(a["bbox"], *limit)]
    corners = [a for a, limit in leaving if _are_corners(a["bbox"], *limit)]
    if 2 * len(leaving) > len(boxes) and (2 * len(corners) > len(leaving) or len(boxes) >= MANY):
        file_names = {image["id"]: image["file_name"] for image in dataset["images"]}
        like = "; they look like corners (left, top, right, bottom)" * (len(corners) > 0)
        yield (
            f"{len(leaving)} of {len(boxes)} boxes leave their image, the first is "
            f"{leaving[0][0]['bbox']} of {place_of(leaving[0][0], file_names)}{like}: {wanted}"
        )
    if not any(min(clip(a["bbox"], *limit)[2:]) > 0 for a, limit in pairs):
        yield f"no box has any area inside its image: {wanted}"


def _leaves(bbox: list[float], width: int, height: int) -> bool:
    """Whether a box leaves its image by more than a pixel; many tools round."""
    x, y, w, h = bbox
    return x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1


def _are_corners(bbox: list[float], width: int, height: int) -> bool:
    """Whether left, top, right and bottom would be a box inside the image."""
    left, top, right, bottom = bbox
    return -1 <= left < right <= width + 1 and -1 <= top < bottom <= height + 1


def place_of(annotation: dict, file_names: dict[int, str]) -> str:
    """How messages call an annotation."""
    return f"annotation {annotation['id']} of image '{file_names[annotation['image_id']]}'"


def is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e9  # false for NaN as well


def clip(bbox: list[float], width: int, height: int) -> list[float]:
    """The part of an (x, y, width, height) box inside the image; sides <= 0 if it is outside.

    >>> clip([-2, 3, 10, 5], width=6, height=6)
    [0, 3, 6, 3]
    """
    x, y, w, h = bbox
    if x >= 0 and y >= 0 and x + w <= width and y + h <= height:
        return bbox  # exactly as annotated: (x + w) - x is not always w
    left, top = max(x, 0), max(y, 0)
    return [left, top, min(x + w, width) - left, min(y + h, height) - top]
