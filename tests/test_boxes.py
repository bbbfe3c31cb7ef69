import math

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from dino_d2.boxes import (
    cxcywh_to_xyxy,
    distinct,
    generalized_iou,
    inverse_sigmoid,
    iou,
    refine,
    xyxy_to_cxcywh,
)


@pytest.fixture
def boxes():
    """Corner boxes with an area."""
    return cxcywh_to_xyxy(0.1 + 0.8 * torch.rand(6, 4))


def test_centre_and_size_give_the_corners():
    boxes = torch.tensor([[[0.5, 0.5, 0.25, 0.5]], [[0.25, 0.75, 0.5, 0.125]]])
    corners = torch.tensor([[[0.375, 0.25, 0.625, 0.75]], [[0.0, 0.6875, 0.5, 0.8125]]])
    assert torch.equal(cxcywh_to_xyxy(boxes), corners)


def test_the_two_box_formats_are_inverse_to_each_other(boxes):
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)


def test_inverse_sigmoid_is_the_logit():
    logits = inverse_sigmoid(torch.tensor([0.25, 0.5, 0.9]))
    # log(1/3), log 1, log 9
    torch.testing.assert_close(logits, torch.tensor([-math.log(3), 0.0, math.log(9)]))


@pytest.mark.parametrize("eps", [1e-3, 1e-6])
def test_inverse_sigmoid_stays_finite_at_and_beyond_its_ends(eps):
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    # log(eps / 1) on the left; the right is its mirror image
    expected = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64) * math.log(eps)
    torch.testing.assert_close(inverse_sigmoid(x, eps), expected)


def test_no_delta_leaves_a_box_where_it_is():
    boxes = torch.rand(10, 4).clamp(1e-3, 1 - 1e-3)
    torch.testing.assert_close(refine(boxes, torch.zeros(10, 4)), boxes)


def test_a_delta_moves_the_logit():
    # odds of 1 : 3, times 9, are 9 : 3
    moved = refine(torch.tensor([0.25]), torch.tensor([math.log(9)]))
    torch.testing.assert_close(moved, torch.tensor([0.75]))


def test_a_point_is_moved_like_a_box_and_gets_its_size_from_the_delta():
    points = torch.tensor([[[0.25, 0.5], [0.5, 0.9]]])
    delta = torch.tensor(
        [[[math.log(9), 0.0, math.log(3), -math.log(3)], [0.0, -math.log(9), -math.log(9), 0.0]]]
    )
    # the odds of the point times those of the delta; the size has the odds of the delta alone
    expected = torch.tensor([[[0.75, 0.5, 0.75, 0.25], [0.5, 0.5, 0.1, 0.5]]])
    torch.testing.assert_close(refine(points, delta), expected)


def test_refined_boxes_stay_in_the_unit_square():
    extreme = refine(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([-50.0, 50.0, 50.0]))
    assert 0 <= extreme.min() and extreme.max() <= 1


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1),  # the same
        ((0, 0, 2, 2), (1, 0, 3, 2), 2 / 6),  # overlap 2, union 6 = hull
        ((0, 0, 2, 2), (0, 0, 4, 4), 4 / 16),  # inside: hull = union
        ((0, 0, 1, 1), (2, 0, 3, 1), 0 - (3 - 2) / 3),  # apart: hull 3, union 2
        ((0, 0, 1, 1), (2, 2, 3, 3), 0 - (9 - 2) / 9),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7 - (9 - 7) / 9),
        ((0, 0, 2, 2), (1, 1, 1, 1), 0),  # a point inside
        ((1, 1, 1, 1), (1, 1, 1, 1), 0),  # twice the same point: 0 / 0
        ((0, 0, 0, 2), (0, 0, 0, 2), 0),  # twice the same line
    ],
)
def test_generalized_iou_of_known_boxes(a, b, expected):
    giou = generalized_iou(torch.tensor(a).float(), torch.tensor(b).float())
    assert giou.item() == pytest.approx(expected, abs=1e-6)


def test_generalized_iou_of_all_pairs_is_that_of_torchvision(boxes):
    pairs = generalized_iou(boxes[:, None], boxes[:4])
    torch.testing.assert_close(pairs, generalized_box_iou(boxes, boxes[:4]))


def test_generalized_iou_pairs_elementwise_without_broadcasting(boxes):
    giou = generalized_iou(boxes, boxes.flip(0))
    torch.testing.assert_close(giou, generalized_box_iou(boxes, boxes.flip(0)).diagonal())


@pytest.mark.parametrize("target", [(0.5, 0.5, 0, 0), (0.5, 0.5, 0, 0.3), (0.1, 0.1, 0, 0)])
def test_a_target_without_area_gives_a_finite_gradient(target):
    box = torch.tensor([0.5, 0.5, 0.2, 0.2], requires_grad=True)
    generalized_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(torch.tensor(target))).backward()
    assert box.grad.isfinite().all()


def test_the_iou_of_pairs_is_the_diagonal_of_that_of_all():
    a, b = (torch.rand(50, 4).double() for _ in range(2))
    a, b = (torch.cat([x[:, :2], x[:, :2] + x[:, 2:]], 1) for x in (a, b))
    torch.testing.assert_close(iou(a, b), box_iou(a, b).diag())


def test_boxes_without_area_have_no_iou_and_equal_ones_have_one():
    box, point = torch.tensor([0.1, 0.2, 0.4, 0.9]), torch.tensor([0.3, 0.3, 0.3, 0.3])
    assert iou(point, point) == 0 and iou(box, point) == 0
    assert iou(box, box) == 1


def suppress(corners, scores, threshold):
    """Non-maximum suppression of one image, box by box: the kept, best first."""
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(corners[i], corners[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_distinct_boxes_are_those_that_suppression_keeps_in_each_image(threshold):
    corners = cxcywh_to_xyxy(0.4 + 0.2 * torch.rand(3, 40, 4))
    scores = torch.rand(3, 40)
    keep = distinct(corners, scores, threshold)
    assert keep.dtype == torch.bool and 3 < keep.sum() < 117
    for image in range(3):
        kept = suppress(corners[image], scores[image], threshold)
        assert keep[image].nonzero().flatten().tolist() == sorted(kept)


def test_boxes_without_area_and_half_precision_are_distinct_too():
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0]]])
    assert distinct(boxes.bfloat16(), torch.zeros(1, 3).bfloat16(), 0.8).all()
