"""What stands in for Detectron2's structures of detections behaves as they do."""

import pytest
import torch
from detectron2 import structures

from dino_d2 import instances

BOXES = torch.tensor([[-5.0, 2.0, 30.0, 50.0], [8.0, 8.0, 8.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
BOTH = pytest.mark.parametrize("kind", [instances, structures], ids=["ours", "theirs"])


@BOTH
def test_boxes_are_clipped_selected_and_measured(kind):
    boxes = kind.Boxes(BOXES)
    boxes.clip((20, 10))
    assert boxes.tensor.tolist() == [[0, 2, 10, 20], [8, 8, 8, 9], [1, 2, 3, 4]]
    assert boxes.nonempty().tolist() == [True, False, True]
    assert boxes.nonempty(threshold=5).tolist() == [True, False, False]
    assert boxes.area().tolist() == [180, 0, 4] and boxes.to("cpu").area()[2] == 4
    assert boxes[2].tensor.tolist() == boxes[boxes.area() == 4].tensor.tolist() == [[1, 2, 3, 4]]
    assert len(boxes[:0]) == 0 and len(boxes) == 3 and "Boxes(tensor(" in repr(boxes)


@BOTH
def test_instances_are_selected_with_all_of_their_fields(kind):
    found = kind.Instances((20, 10), pred_boxes=kind.Boxes(BOXES), scores=torch.tensor([3, 2, 1.0]))
    found.pred_classes = torch.tensor([0, 1, 0])
    assert len(found) == 3 and found.image_size == (20, 10)
    kept = found[found.scores >= 2].to("cpu")
    assert kept.pred_classes.tolist() == [0, 1] and len(kept.pred_boxes) == len(kept) == 2
    assert found[0].scores.tolist() == [3] and found[-1].scores.tolist() == [1]
    assert found[1:].get("scores").tolist() == [2, 1]
    assert found.has("scores") and not found.has("pred_masks")
    assert list(found.get_fields()) == ["pred_boxes", "scores", "pred_classes"]
    assert "scores" in repr(found)
    with pytest.raises(AttributeError, match="pred_masks"):
        found.pred_masks  # noqa: B018
    with pytest.raises((AssertionError, ValueError)):
        found.pred_masks = torch.zeros(2, 20, 10)
    with pytest.raises(IndexError):
        found[3]
