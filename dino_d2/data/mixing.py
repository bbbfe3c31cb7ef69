"""Mosaic and mixup: training images made of several."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import Tensor
from torch.nn import functional as F

from ..ranges import require_share
from .augmentation import visible

# Of DEIM, https://arxiv.org/abs/2412.04234: the size of a mosaic relative to the image that it
# fills, and the weight in mixup.
SCALES = (0.5, 1.5)
WEIGHTS = (0.45, 0.55)
SHIFT = 0.1  # how far the middle of a mosaic is moved at most, relative to the image
BACKGROUND = 114  # a gray near the mean of photographs, where a mosaic has nothing
MIN_SIDE = 1.0  # pixels; boxes that are less wide or high after scaling and clipping are dropped


class Mixing:
    """Combines an augmented training image with others of the data set, after DEIM.

    A mosaic (YOLOv4, https://arxiv.org/abs/2004.10934) has four images around a point near the
    middle. Mixup (https://arxiv.org/abs/1710.09412) blends two images, which may be mosaics, and
    keeps the boxes of both. The result has the size of the first image. The others are drawn from
    the whole data set with equal probability, and augmented as the first. (DEIM also rotates the
    tiles of a mosaic, by up to 10 degrees.) Masks are moved with their boxes.

    Args:
        mosaic: probability that an image becomes a mosaic
        mixup: probability that an image is blended with another
        span: the part of the run in which images are mixed, as fractions of its iterations
        min_visible: boxes of which a smaller share of the area is left in a mosaic are dropped

    Raises:
        ValueError: a number is not from 0 to 1, or the span is not two such numbers in order
    """

    def __init__(
        self,
        mosaic: float = 0.5,
        mixup: float = 0.5,
        span: Sequence[float] = (0.05, 0.5),
        min_visible: float = 0.0,
    ):
        require_share(mosaic=mosaic, mixup=mixup, min_visible=min_visible)
        if len(span) != 2 or not 0 <= span[0] <= span[1] <= 1:
            raise ValueError(
                f"the span of mosaic and mixup is {list(span)}; give two fractions of the run, "
                "from 0 to 1: where mixing starts and where it ends"
            )
        self.mosaic, self.mixup, self.span = mosaic, mixup, tuple(span)
        self.min_visible = min_visible

    def places(self, max_iter: int, images: int) -> range:
        """The images to mix, counted from the first of a run with a batch size of `images`."""
        first, last = (round(share * max_iter) * images for share in self.span)
        if first == last:
            raise ValueError(
                f"the span of mosaic and mixup, {self.span}, has no iteration of {max_iter}: give "
                "a longer one (INPUT.MIXING.SPAN, dataloader.mixing.span), or set both to 0"
            )
        return range(first, last)

    def __call__(self, dataset: Sequence[dict], index: int) -> dict:
        """The image of an index, mixed with others; all random numbers are NumPy's.

        Args:
            dataset: of what `Mapper` returns; nothing of it is changed

        Returns:
            the same with another "image" (C, H, W) and other "instances", and the names of the
            other images as "mixed_with"; the rest is that of the first image
        """
        sample = self.perhaps_mosaic(dataset, index)
        if np.random.rand() < self.mixup:
            sample = mixup(sample, self.perhaps_mosaic(dataset, draw(dataset)))
        return sample

    def perhaps_mosaic(self, dataset: Sequence[dict], index: int) -> dict:
        sample = dataset[index]
        if np.random.rand() < self.mosaic:
            others = [dataset[draw(dataset)] for _ in range(3)]
            sample = mosaic([sample, *others], self.min_visible)
        return sample


def draw(dataset: Sequence[Any]) -> int:
    return int(np.random.randint(len(dataset)))


def mosaic(samples: Sequence[dict], min_visible: float = 0.0) -> dict:
    """Four images around a point, scaled to fit a quarter of the first, and by a common factor."""
    image = torch.full_like(samples[0]["image"], BACKGROUND)
    _, height, width = image.shape
    scale = np.random.uniform(*SCALES)
    shift_x, shift_y = np.random.uniform(0.5 - SHIFT, 0.5 + SHIFT, 2)
    middle_x, middle_y = round(shift_x * width), round(shift_y * height)
    parts = []
    for number, sample in enumerate(samples):
        tile = resized(sample["image"], scale * fit(sample, height / 2, width / 2))
        ratios = ratios_of(tile, sample)
        # its corner in the mosaic, which may be outside
        x = middle_x - (0 if number % 2 else tile.shape[2])
        y = middle_y - (0 if number // 2 else tile.shape[1])
        tile = tile[:, max(-y, 0) : height - y, max(-x, 0) : width - x]
        _, rows, columns = tile.shape
        top, left = max(y, 0), max(x, 0)
        image[:, top : top + rows, left : left + columns] = tile
        parts.append(moved(sample["instances"], ratios, (x, y), (height, width)))
    return mixed(samples, image, remaining(join(parts), min_visible))


def mixup(first: dict, second: dict) -> dict:
    """A blend of two images; the second is scaled to fit into the first, at its upper left."""
    _, height, width = first["image"].shape
    weight = np.random.uniform(*WEIGHTS)
    other = resized(second["image"], fit(second, height, width))
    size, ratios = (height, width), ratios_of(other, second)
    _, rows, columns = other.shape
    image = first["image"].clone()
    part = image[:, :rows, :columns]
    part[:] = (weight * part + (1 - weight) * other).round()
    added = remaining(moved(second["instances"], ratios, (0, 0), size))
    own = moved(first["instances"], (1, 1), (0, 0), size)
    return mixed([first, second], image, join([own, added]))


def fit(sample: dict, height: float, width: float) -> float:
    """The factor that scales an image to fit into a size."""
    return min(height / sample["image"].shape[1], width / sample["image"].shape[2])


def resized(image: Tensor, factor: float) -> Tensor:
    """An image (C, H, W) scaled by a factor."""
    size = [max(round(factor * side), 1) for side in image.shape[1:]]
    # As floats: PyTorch fails on some strips of bytes.
    scaled = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return scaled.round().to(image.dtype)


def ratios_of(scaled: Tensor, sample: dict) -> tuple[float, float]:
    """Width and height of a scaled image (C, H, W), relative to those that it had."""
    _, height, width = sample["image"].shape
    return scaled.shape[2] / width, scaled.shape[1] / height


def moved(
    instances: Instances, ratios: Sequence[float], corner: Sequence[int], size: tuple[int, int]
) -> Instances:
    """Objects in a scaled image that is pasted into another one.

    Args:
        ratios: by which width and height were scaled
        corner: x and y of the upper left of the scaled image in the other one
        size: height and width of the other one
    """
    scale, shift = torch.tensor(ratios).repeat(2), torch.tensor(corner).repeat(2)
    boxes = Boxes(instances.gt_boxes.tensor * scale + shift)
    result = Instances(size, gt_boxes=boxes, gt_classes=instances.gt_classes)
    if not instances.has("gt_masks"):
        return result
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        x_y = [[part.reshape(-1, 2) * ratios + corner for part in parts] for parts in masks]
        result.gt_masks = PolygonMasks([[part.ravel() for part in parts] for parts in x_y])
    else:
        result.gt_masks = BitMasks(pasted(masks.tensor, ratios, corner, size))
    everything = torch.ones(len(instances), dtype=torch.bool)
    for name in ("has_mask", "has_box"):  # all are and have, unless instances say otherwise
        result.set(name, instances.get(name) if instances.has(name) else everything)
    return result


def pasted(
    masks: Tensor, ratios: Sequence[float], corner: Sequence[int], size: tuple[int, int]
) -> Tensor:
    """Masks (n, height, width) bool in the other image; arguments as of `moved`."""
    for axis, side in ((1, size[0]), (2, size[1])):
        # the pixel under the middle of each row or column of the other image
        middles = torch.arange(side) + 0.5 - corner[2 - axis]
        source, last = (middles / ratios[2 - axis]).floor().long(), masks.shape[axis] - 1
        masks = masks.index_select(axis, source.clamp(0, last))
        masks.transpose(0, axis)[(source < 0) | (source > last)] = False
    return masks


def join(parts: Sequence[Instances]) -> Instances:
    """All objects of an image; parts without any may lack the masks that others have."""
    return Instances.cat([part for part in parts if len(part)] or parts[:1])


def remaining(instances: Instances, min_visible: float = 0.0) -> Instances:
    """Objects, clipped to their image, without those too small to remain."""
    kept = visible(instances.gt_boxes, instances.image_size, min_visible)
    instances.gt_boxes.clip(instances.image_size)
    sides = instances.gt_boxes.tensor[:, 2:] - instances.gt_boxes.tensor[:, :2]
    kept &= (sides >= MIN_SIDE).all(dim=1)
    if instances.has("gt_masks"):
        kept &= instances.gt_masks.nonempty()
    return instances[kept]


def mixed(samples: Sequence[dict], image: Tensor, instances: Instances) -> dict:
    first, *others = samples
    names = list(first.get("mixed_with", ()))
    for other in others:
        names += [other["file_name"], *other.get("mixed_with", ())]
    return first | {"image": image, "instances": instances, "mixed_with": names}
