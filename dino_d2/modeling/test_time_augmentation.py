"""Detects in several views of an image, and merges what is found."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn
from torchvision.ops import batched_nms

from .detector import Batch


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
        own = [{"image": view["image"]} for view in views]  # boxes in pixels of the view
        found = [result["instances"] for result in self.detector(own)]
        parts = [
            view["transforms"].inverse().apply_box(instances.pred_boxes.tensor.cpu().numpy())
            for view, instances in zip(views, found, strict=True)
        ]
        scores = torch.cat([instances.scores for instances in found])
        labels = torch.cat([instances.pred_classes for instances in found])
        boxes = torch.cat([torch.from_numpy(part) for part in parts]).to(scores)
        return self.merge(boxes, scores, labels, (x["height"], x["width"]))

    def merge(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int]
    ) -> Instances:
        """Of n corner boxes (n, 4) in an image (height, width), those that stay, best first."""
        corners = Boxes(boxes)
        corners.clip(size)
        kept = batched_nms(corners.tensor, scores, labels, self.iou)[: self.max_detections]
        near = pairwise_iou(corners[kept], corners) > self.iou
        near[range(len(kept)), kept] = True  # itself, also without area or with an IoU of 1
        # Distinct queries give a score of 0 to what they leave out.
        votes = scores.clamp(min=1e-6) * (near & (labels[kept, None] == labels))
        means = Boxes(votes @ corners.tensor / votes.sum(1, keepdim=True))
        return Instances(size, pred_boxes=means, scores=scores[kept], pred_classes=labels[kept])
