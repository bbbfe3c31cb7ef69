"""The quickstart's dataset: four kinds of shapes on textured backgrounds, in COCO format.

It is generated in seconds and learned in minutes. As in real data, objects overlap and have many
sizes, images have many sizes, and some are empty.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..progress import progress
from .convert import write_json
from .faults import missing_images
from .masks import encode_mask

IMAGE_SIDE = (96, 136)  # pixels, each side drawn independently
DIAMETER = (30, 84)  # pixels, of the circle around a shape
MAX_SHAPES = 9
EMPTY_IMAGES = 0.04  # fraction
MIN_VISIBLE = 0.7  # fraction of a shape that later ones leave uncovered
MIN_CONTRAST = 120  # distance in RGB between a shape and what is under it
SENSOR_NOISE = 4  # standard deviation of every pixel, in grey levels
SUPERSAMPLING = 4
VERSION = "5"  # change it with the pictures, so that existing datasets are generated again


def _repeat(turns: int, *corners: complex) -> np.ndarray:
    """The closed outline made of ``corners`` repeated by ``turns`` rotations about 0."""
    return np.outer(np.exp(2j * np.pi * np.arange(turns) / turns), corners).ravel()


# Points of the complex plane inside the unit circle: a product turns and scales, a sum moves.
OUTLINES = {
    "circle": _repeat(64, 1),
    "square": _repeat(4, 1),
    "triangle": _repeat(3, 1),
    "star": _repeat(5, 1, 0.4 * np.exp(0.2j * np.pi)),
}


def generate(root: Path, num_train: int = 480, num_val: int = 96, seed: int = 0) -> None:
    """Write ``train.json``, ``val.json`` and ``images/*.jpg`` under ``root``.

    Image number i of a split depends only on ``seed`` (>= 0) and i. A complete dataset made with
    the same arguments is kept; an incomplete one is generated again.

    Raises:
        FileExistsError: there are annotations of something else, which would be lost
    """
    root = Path(root)
    info: dict[str, Any] = {
        "description": "shapes on textured backgrounds",
        "version": VERSION,
        "arguments": {"num_train": num_train, "num_val": num_val, "seed": seed},
    }
    splits = {"train": num_train, "val": num_val}
    if all(_is_complete(root, split, info) for split in splits):
        return
    (root / "images").mkdir(parents=True, exist_ok=True)
    # While images are being replaced, there are no annotations that could disagree with them.
    for split in splits:
        _remove_generated(root / f"{split}.json", info["description"])
    datasets = {
        split: {"info": info, **_write_images(root / "images", split, number, count, seed)}
        for number, (split, count) in enumerate(splits.items())
    }
    for split, dataset in datasets.items():
        write_json(dataset, root / f"{split}.json")


def _remove_generated(path: Path, description: str) -> None:
    if not path.is_file():
        return
    info = json.loads(path.read_text()).get("info", {})
    if info.get("description") != description:
        raise FileExistsError(f"'{path}' is not a generated dataset: choose another folder")
    path.unlink()


def _is_complete(root: Path, split: str, info: dict) -> bool:
    path = root / f"{split}.json"
    if not path.is_file():
        return False
    dataset, folder = json.loads(path.read_text()), str(root / "images")
    return dataset.get("info") == info and not missing_images(dataset["images"], folder)


def _write_images(folder: Path, split: str, split_number: int, count: int, seed: int) -> dict:
    """Draw and save ``count`` images; returns their COCO images, annotations and categories."""
    images: list[dict] = []
    annotations: list[dict] = []
    for index in progress(range(count), "image", what=f"drawing {split} images"):
        pixels, shapes = _draw_image(np.random.default_rng((seed, split_number, index)))
        file_name = f"{split}_{index:05d}.jpg"
        Image.fromarray(pixels).save(folder / file_name, quality=95)
        height, width, _ = pixels.shape
        images.append({"id": index, "file_name": file_name, "height": height, "width": width})
        for category, visible in shapes:
            # Ids start at 1: COCO's evaluation ignores matches with annotation 0.
            ids = {"id": len(annotations) + 1, "image_id": index, "category_id": category + 1}
            shape = {"bbox": _tight_box(visible), "area": int(visible.sum()), "iscrowd": 0}
            annotations.append(ids | shape | {"segmentation": encode_mask(visible)})
    categories = [{"id": id, "name": name} for id, name in enumerate(OUTLINES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _tight_box(visible: np.ndarray) -> list[int]:
    """The (x, y, width, height) of the true pixels of an (H, W) mask."""
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return [int(left), int(top), int(right - left), int(bottom - top)]


def _draw_image(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One image (H, W, 3) of uint8, and each shape's class and visible mask (H, W).

    A shape that would cover too much of an earlier one is skipped, but never the first.
    """
    height, width = rng.integers(*IMAGE_SIDE, size=2, endpoint=True)
    pixels = _draw_background(rng, height, width)
    owner = np.zeros((height, width), dtype=int)  # 0 is the background, k is shape number k
    categories, areas = [], [height * width]
    num_shapes = 0 if rng.random() < EMPTY_IMAGES else rng.integers(1, MAX_SHAPES, endpoint=True)
    for _ in range(num_shapes):
        category = int(rng.integers(len(OUTLINES)))
        coverage = _coverage(rng, list(OUTLINES.values())[category], height, width)
        mask = coverage >= 0.5
        covered = np.where(mask, len(areas), owner)
        visible = np.bincount(covered.ravel(), minlength=len(areas))
        if (visible[1 : len(areas)] < MIN_VISIBLE * np.array(areas[1:])).any():
            continue
        owner = covered
        categories.append(category)
        areas.append(mask.sum())
        colour = _contrasting_colour(rng, pixels[mask].mean(axis=0))
        pixels += coverage[..., None] * (colour - pixels)
    pixels += rng.normal(scale=SENSOR_NOISE, size=pixels.shape)
    shapes = [(category, owner == number) for number, category in enumerate(categories, start=1)]
    return pixels.clip(0, 255).astype(np.uint8), shapes


def _draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random blend of a gradient, stripes and blobs between two colours, as (H, W, 3) floats."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    angle, phase = rng.uniform(0, 2 * np.pi, size=2)
    gradient = x * np.cos(angle) + y * np.sin(angle)
    stripes = np.sin(2 * np.pi * rng.uniform(2, 16) * gradient + phase)
    coarse = rng.uniform(-1, 1, size=rng.integers(3, 24, size=2)).astype(np.float32)
    blobs = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    texture = np.tensordot(rng.dirichlet([0.5] * 3), [gradient, stripes, blobs], axes=1)
    return rng.uniform(40, 215, size=3) + texture[..., None] * rng.uniform(-45, 45, size=3)


def _coverage(rng: np.random.Generator, outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """The coverage, (H, W) in [0, 1], of ``outline`` turned, scaled and put inside the image."""
    radius = np.exp(rng.uniform(*np.log(DIAMETER))) / 2
    centre = complex(rng.uniform(radius, width - radius), rng.uniform(radius, height - radius))
    points = centre + radius * np.exp(1j * rng.uniform(0, 2 * np.pi)) * outline
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    corners = [(point.real, point.imag) for point in points * SUPERSAMPLING]
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) / 255


def _contrasting_colour(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """A random colour that stands out from ``background``, both (3,) in [0, 255]."""
    candidates = rng.uniform(0, 255, size=(32, 3))
    contrast = np.linalg.norm(candidates - background, axis=1)
    return candidates[np.argmax(contrast >= MIN_CONTRAST)]
