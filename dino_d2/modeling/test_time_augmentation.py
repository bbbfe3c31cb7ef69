"""Detects in several views of an image, and merges the detections."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.transforms.transform import Transform
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ..resizing import MASKS_AT_ONCE, masks_of_maps
from .detector import Batch
from .dino import padding_mask
from .mask_dino import MaskDINO
from .masks import sample_maps


class WithTTA(nn.Module):
    """A detector with test-time augmentation, called as the detector is.

    As Detectron2's `GeneralizedRCNNWithTTA`: boxes of all views are brought back to the image, and
    class-wise non-maximum suppression keeps the best of those that overlap. Its box becomes the
    mean of theirs, weighted by score (box voting, arXiv 1505.01749, section 5).

    Args:
        detector: called in evaluation mode
        views: makes the views of an input, each with its "transforms", such as Detectron2's
            `DatasetMapperTTA`
        iou: largest IoU of two detections of a class, in (0, 1]
        max_detections: per image
    """

    def __init__(
        self,
        detector: nn.Module,
        views: Callable[[dict[str, Any]], Batch],
        *,
        iou: float,
        max_detections: int,
    ):
        super().__init__()
        self.detector, self.views = detector, views
        self.iou, self.max_detections = iou, max_detections
        self.train(detector.training)

    def forward(self, batched_inputs: Batch) -> list[dict[str, Instances]]:
        return [{"instances": self.detect(x)} for x in batched_inputs]

    def detect(self, x: dict[str, Any]) -> Instances:
        """The detections of an input with "image" (C, H, W), "height" and "width"."""
        views = self.views(x)
        transforms = [view["transforms"] for view in views]
        found = self.find([{"image": view["image"]} for view in views])
        parts = [
            own.inverse().apply_box(instances.pred_boxes.tensor.cpu().numpy())
            for own, instances in zip(transforms, found, strict=True)
        ]
        scores = torch.cat([instances.scores for instances in found])
        labels = torch.cat([instances.pred_classes for instances in found])
        boxes = torch.cat([torch.from_numpy(part) for part in parts]).to(scores)
        merged, shares = self.merge(boxes, scores, labels, (x["height"], x["width"]))
        return self.complete(merged, shares, found, transforms)

    def find(self, views: Batch) -> list[Instances]:
        """The detections of each view, in its pixels."""
        return [result["instances"] for result in self.detector(views)]

    def complete(
        self,
        merged: Instances,
        shares: Tensor,
        found: Sequence[Instances],
        transforms: Sequence[Transform],
    ) -> Instances:
        """Merged detections with what else there is to merge: here nothing.

        Args:
            merged: m of them, with boxes, scores and classes
            shares: (m, n), of the n detections of all views in each, sum to 1
            found: the n detections, by view
            transforms: of the image, by view
        """
        return merged

    def merge(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int]
    ) -> tuple[Instances, Tensor]:
        """Of n corner boxes (n, 4) in an image (height, width), the m that stay, best first; and
        the shares (m, n) of all in them."""
        corners = Boxes(boxes)
        corners.clip(size)
        kept = batched_nms(corners.tensor, scores, labels, self.iou)[: self.max_detections]
        near = pairwise_iou(corners[kept], corners) > self.iou
        near[range(len(kept)), kept] = True  # itself, also without area or with an IoU of 1
        # Distinct queries give a score of 0 to suppressed queries.
        votes = scores.clamp(min=1e-6) * (near & (labels[kept, None] == labels))
        shares = votes / votes.sum(1, keepdim=True)
        means = Boxes(shares @ corners.tensor)
        merged = Instances(size, pred_boxes=means, scores=scores[kept], pred_classes=labels[kept])
        return merged, shares


class MaskDINOWithTTA(WithTTA):
    """A Mask DINO with test-time augmentation: its detections have "pred_masks".

    The logits of a mask are the mean of those of the detections that its box is the mean of, with
    the same weights. Scores are those of classes times the certainty of the mask, as without
    augmentation. Maps of the views stay at stride 4; there are never more than `MASKS_AT_ONCE` in
    the size of the image.
    """

    detector: MaskDINO

    def find(self, views: Batch) -> list[Instances]:
        found = []
        for view in views:  # one at a time, as each has pixel embeddings
            images = self.detector.preprocess_images([view])
            output = self.detector.detect(images.tensor, padding_mask(images))
            found.append(self.detector.detections(output, images)[0]["instances"])
        return found

    def complete(
        self,
        merged: Instances,
        shares: Tensor,
        found: Sequence[Instances],
        transforms: Sequence[Transform],
    ) -> Instances:
        size, stride = merged.image_size, self.detector.pixel_embedding.stride
        # Sampling is linear: the means of each view come first.
        maps = [
            torch.tensordot(own, instances.mask_logits.to(own), 1)
            for own, instances in zip(shares.split([*map(len, found)], 1), found, strict=True)
        ]
        places = [
            pixel_points(own, size, [stride * x for x in part.shape[1:]]).to(part.device)
            for own, part in zip(transforms, maps, strict=True)
        ]
        masks = shares.new_empty(len(merged), *size, dtype=torch.bool)
        certainty = torch.empty_like(merged.scores)
        for start in range(0, len(merged), MASKS_AT_ONCE):
            some = slice(start, start + MASKS_AT_ONCE)
            total = shares.new_zeros(len(masks[some]), *size)
            for own, points in zip(maps, places, strict=True):
                total += sample_maps(own[None, some], points[None], "border")[0]
            masks[some], certainty[some] = masks_of_maps(total)
        merged.pred_masks, merged.scores = masks, merged.scores * certainty
        return merged[merged.scores.argsort(descending=True, stable=True)]


def pixel_points(transforms: Transform, size: tuple[int, int], padded: Sequence[int]) -> Tensor:
    """Where a view has the pixels of its image.

    Args:
        transforms: made the view
        size: height and width of the image
        padded: height and width of the view with its padding

    Returns:
        (height, width, 2), x and y from 0 to 1 over the padded view
    """
    rows, columns = np.indices(size, dtype=np.float32) + 0.5  # middles of pixels
    points = transforms.apply_coords(np.stack([columns, rows], -1).reshape(-1, 2))
    relative = points / np.array(padded[::-1], dtype=np.float32)
    return torch.from_numpy(relative).view(*size, 2)
