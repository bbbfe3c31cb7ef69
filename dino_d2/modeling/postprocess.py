"""From the predictions of the last layer to Detectron2's instances."""

import torch
from detectron2.structures import Boxes, Instances

from ..boxes import cxcywh_to_xyxy
from ..structures import Predictions


def postprocess(
    predictions: Predictions, image_sizes: list[tuple[int, int]], max_detections: int
) -> list[Instances]:
    """The best (query, class) pairs of each image; a query may give several. No NMS.

    Args:
        predictions: of B images
        image_sizes: (height, width) of each image without padding, to which boxes are scaled
        max_detections: per image, at most Q * K can be had

    Returns:
        instances with pred_boxes, scores (falling) and pred_classes
    """
    num_classes = predictions.logits.shape[-1]
    # Probabilities in bfloat16 would tie where logits do not.
    logits = predictions.logits.to(torch.promote_types(predictions.logits.dtype, torch.float32))
    scores = logits.flatten(1).sigmoid()
    scores, indices = scores.topk(min(max_detections, scores.shape[1]), dim=1)
    queries, classes = indices // num_classes, indices % num_classes
    corners = cxcywh_to_xyxy(predictions.boxes)
    results = []
    for score, query, label, box, (height, width) in zip(
        scores, queries, classes, corners, image_sizes, strict=True
    ):
        boxes = Boxes(box[query])
        boxes.scale(scale_x=width, scale_y=height)
        results.append(
            Instances((height, width), pred_boxes=boxes, scores=score, pred_classes=label)
        )
    return results
