from itertools import permutations
from math import exp, log

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_d2.modeling import HungarianMatcher, matcher
from dino_d2.structures import Match, Predictions

NUM_QUERIES = 4


def slow_cost(logits, box, label, target):
    """Of one query and one box: the formulas of Deformable DETR on Python numbers."""
    p = 1 / (1 + exp(-logits[label]))
    classes = 0.25 * (1 - p) ** 2 * -log(p) - 0.75 * p**2 * -log(1 - p)
    distance = sum(abs(a - b) for a, b in zip(box, target, strict=True))
    (ax, ay, aw, ah), (bx, by, bw, bh) = box, target
    spans = [
        (sorted((a - s / 2, a + s / 2, b - t / 2, b + t / 2)), s + t)
        for a, s, b, t in ((ax, aw, bx, bw), (ay, ah, by, bh))
    ]
    # along an axis: the hull is from the first end to the last, the overlap what is counted twice
    hulls = [ends[3] - ends[0] for ends, _ in spans]
    overlaps = [max(0, total - hull) for (_, total), hull in zip(spans, hulls, strict=True)]
    overlaps = [min(o, *sides) for o, sides in zip(overlaps, ((aw, bw), (ah, bh)), strict=True)]
    overlap, hull = overlaps[0] * overlaps[1], hulls[0] * hulls[1]
    union = aw * ah + bw * bh - overlap
    giou = overlap / union - (hull - union) / hull
    return 2 * classes + 5 * distance - 2 * giou


def cost_table(predictions, target, stage, image):
    """[query][box]"""
    return [
        [
            slow_cost(logits, box, label, other)
            for label, other in zip(target.labels.tolist(), target.boxes.tolist(), strict=True)
        ]
        for logits, box in zip(
            predictions.logits[stage, image].tolist(),
            predictions.boxes[stage, image].tolist(),
            strict=True,
        )
    ]


def best_assignment(table, num_boxes):
    """All pairs (query, box) of the cheapest assignment, by trying all of them."""
    if num_boxes <= NUM_QUERIES:
        candidates = [
            list(zip(queries, range(num_boxes), strict=True))
            for queries in permutations(range(NUM_QUERIES), num_boxes)
        ]
    else:
        candidates = [
            list(zip(range(NUM_QUERIES), boxes, strict=True))
            for boxes in permutations(range(num_boxes), NUM_QUERIES)
        ]
    return min(candidates, key=lambda pairs: sum(table[q][b] for q, b in pairs))


@pytest.mark.parametrize(
    "counts",
    [(1,), (3, 2), (4,), (6, 1), (0, 2, 0, 3), (0, 0)],
    ids=lambda counts: "_".join(map(str, counts)),
)
def test_every_stage_and_image_has_its_own_cheapest_assignment(
    make_predictions, make_targets, counts
):
    predictions = make_predictions(2, len(counts), num_queries=NUM_QUERIES)
    targets = make_targets(*counts)
    match = HungarianMatcher()(predictions, targets)
    for stage in range(2):
        expected = set()
        for image, target in enumerate(targets):
            table = cost_table(predictions, target, stage, image)
            first = sum(counts[:image])  # boxes are counted through the batch
            pairs = best_assignment(table, counts[image])
            expected |= {(image, query, first + box) for query, box in pairs}
        rows = zip(match.images, match.queries[stage], match.targets[stage], strict=True)
        assert {tuple(map(int, row)) for row in rows} == expected


def test_costs_are_those_of_the_paper(make_predictions, make_targets):
    predictions, (target,) = make_predictions(1, 1), make_targets(3)
    (cost,) = HungarianMatcher().costs(predictions, [target])
    expected = torch.tensor(cost_table(predictions, target, 0, 0))
    torch.testing.assert_close(cost, expected, rtol=1e-4, atol=1e-4)


def test_every_box_is_weighed_against_the_queries_of_its_own_image(
    make_predictions, make_targets, monkeypatch
):
    monkeypatch.setattr(matcher, "BOXES_AT_ONCE", 2)  # the five boxes are looked at in three parts
    predictions, targets = make_predictions(2, 3), make_targets(5, 0, 1)
    costs = HungarianMatcher().costs(predictions, targets)
    for stage, cost in enumerate(costs):
        tables = [cost_table(predictions, target, stage, i) for i, target in enumerate(targets)]
        expected = torch.cat([torch.tensor(table) for table in tables], 1)
        torch.testing.assert_close(cost, expected, rtol=1e-4, atol=1e-4)


def test_nothing_takes_more_memory_than_the_costs_themselves(
    make_predictions, make_targets, monkeypatch
):
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.untyped_storage().nbytes() for x in tree_leaves(result))
            return result

    monkeypatch.setattr(matcher, "BOXES_AT_ONCE", 20)
    predictions, targets = make_predictions(2, 2), make_targets(200, 1)
    with Sizes():
        costs = HungarianMatcher().costs(predictions, targets)
    # of two stages, five queries and 201 boxes, in float32
    assert costs.untyped_storage().nbytes() == max(sizes) == 2 * 5 * 201 * 4


@pytest.mark.parametrize("only", ["class_cost", "bbox_cost", "giou_cost"])
def test_each_weight_scales_its_own_cost(make_predictions, make_targets, only):
    predictions, (target,) = make_predictions(1, 1), make_targets(3)
    off = {"class_cost": 0.0, "bbox_cost": 0.0, "giou_cost": 0.0}
    one, three = (
        HungarianMatcher(**(off | {only: weight})).costs(predictions, [target])
        for weight in (1.0, 3.0)
    )
    torch.testing.assert_close(three, 3 * one)
    assert one.any()


def test_images_with_more_boxes_than_queries_match_every_query(make_predictions, make_targets):
    match = HungarianMatcher()(make_predictions(2, 1, num_queries=3), make_targets(50))
    assert match.queries.tolist() == [[0, 1, 2]] * 2
    assert all(len(set(row)) == 3 for row in match.targets.tolist())


def test_a_batch_without_boxes_matches_nothing(make_predictions, make_targets):
    match = HungarianMatcher()(make_predictions(3, 2), make_targets(0, 0))
    assert [tuple(x.shape) for x in match] == [(0,), (3, 0), (3, 0)]
    assert all(x.dtype == torch.int64 for x in match)


@pytest.mark.parametrize("field", Predictions._fields)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_stop_the_training(
    make_predictions, make_targets, field, value
):
    predictions = make_predictions(1, 2)
    getattr(predictions, field)[0, 1, 2] = value
    with pytest.raises(FloatingPointError, match="training has diverged"):
        HungarianMatcher()(predictions, make_targets(1, 2))


def test_matches_are_on_the_device_of_the_predictions(make_predictions, make_targets, device):
    predictions = Predictions(*(x.to(device) for x in make_predictions(1, 1)))
    targets = [type(t)(*(x.to(device) for x in t)) for t in make_targets(2)]
    match = HungarianMatcher()(predictions, targets)
    assert isinstance(match, Match) and all(x.device.type == device.type for x in match)
