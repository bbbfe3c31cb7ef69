from itertools import permutations
from math import exp, log, sqrt

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_d2.modeling import HungarianMatcher, PositionModulatedMatcher, matcher
from dino_d2.modeling.matcher import instability, queries_of_boxes
from dino_d2.structures import Match, Predictions, Target

NUM_QUERIES = 4
EVERY = pytest.mark.parametrize("kind", [HungarianMatcher, PositionModulatedMatcher])


def slow_cost(logits, box, label, target, modulation=1.0):
    """Of one query and one box: the formulas of Deformable DETR on Python numbers."""
    p = modulation / (1 + exp(-logits[label]))
    classes = 0.25 * (1 - p) ** 2 * -log(p) - 0.75 * p**2 * -log(1 - p)
    distance = sum(abs(a - b) for a, b in zip(box, target, strict=True))
    return 2 * classes + 5 * distance - 2 * slow_giou(box, target)


def slow_giou(box, target):
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
    return overlap / union - (hull - union) / hull


def cost_table(predictions, target, stage, image, kind=HungarianMatcher):
    """[query][box]"""
    logits, boxes = (x[stage, image].tolist() for x in predictions)
    labels, others = (x.tolist() for x in target)
    fits = [[(slow_giou(box, other) + 1) / 2 for other in others] for box in boxes]
    best = max((fit for row in fits for fit in row), default=1)

    def modulation(query, box):
        return sqrt(fits[query][box] / best) if kind is PositionModulatedMatcher else 1

    return [
        [
            slow_cost(logits[query], boxes[query], labels[box], others[box], modulation(query, box))
            for box in range(len(labels))
        ]
        for query in range(len(boxes))
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


@EVERY
def test_costs_are_those_of_the_paper(make_predictions, make_targets, kind):
    predictions, (target,) = make_predictions(1, 1), make_targets(3)
    (cost,) = kind().costs(predictions, [target])
    expected = torch.tensor(cost_table(predictions, target, 0, 0, kind))
    torch.testing.assert_close(cost, expected, rtol=1e-4, atol=1e-4)


@EVERY
def test_every_box_is_weighed_against_the_queries_of_its_own_image(
    make_predictions, make_targets, monkeypatch, kind
):
    monkeypatch.setattr(matcher, "BOXES_AT_ONCE", 2)  # the five boxes are looked at in three parts
    predictions, targets = make_predictions(2, 3), make_targets(5, 0, 1)
    costs = kind().costs(predictions, targets)
    for stage, cost in enumerate(costs):
        tables = [
            cost_table(predictions, target, stage, i, kind) for i, target in enumerate(targets)
        ]
        expected = torch.cat([torch.tensor(table) for table in tables], 1)
        torch.testing.assert_close(cost, expected, rtol=1e-4, atol=1e-4)


@EVERY
def test_nothing_takes_more_memory_than_the_costs_themselves(
    make_predictions, make_targets, monkeypatch, kind
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
        costs = kind().costs(predictions, targets)
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


# ---- costs that are not finite


def is_one_to_one(match, num_pairs):
    """Within a stage of one image."""
    return all(
        len(row) == len(set(row)) == num_pairs
        for row in (*match.queries.tolist(), *match.targets.tolist())
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("field", Predictions._fields)
def test_a_broken_query_is_matched_last(make_predictions, make_targets, field, value):
    predictions, targets = make_predictions(2, 1, num_queries=6), make_targets(4)
    others = [0, 2, 3, 4, 5]
    without = Predictions(*(x[:, :, others] for x in predictions))
    expected = HungarianMatcher()(without, targets)
    getattr(predictions, field)[:, :, 1] = value
    match = HungarianMatcher()(predictions, targets)
    assert torch.equal(match.queries, torch.tensor(others)[expected.queries])
    assert torch.equal(match.targets, expected.targets)


@EVERY
@pytest.mark.parametrize("num_boxes", [3, 5, 8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_there_is_a_match_whatever_the_predictions_and_boxes_are(
    make_predictions, make_targets, kind, num_boxes, value
):
    (target,), good = make_targets(num_boxes), make_predictions(2, 1)
    for predictions, of_target in [
        (good._replace(logits=torch.full_like(good.logits, value)), target),
        (good._replace(boxes=torch.full_like(good.boxes, value)), target),
        (good, target._replace(boxes=torch.full_like(target.boxes, value))),
    ]:
        assert is_one_to_one(kind()(predictions, [of_target]), min(num_boxes, 5))


def test_one_broken_box_leaves_the_others_their_queries(make_predictions, make_targets):
    predictions, (target,) = make_predictions(2, 1, num_queries=6), make_targets(4)
    broken = target._replace(boxes=target.boxes.clone())
    broken.boxes[2] = torch.nan
    others = [0, 1, 3]
    expected = HungarianMatcher()(predictions, [Target(*(x[others] for x in target))])
    match = HungarianMatcher()(predictions, [broken])
    for stage in range(2):
        pairs = dict(zip(match.targets[stage].tolist(), match.queries[stage].tolist(), strict=True))
        del pairs[2]
        boxes = torch.tensor(others)[expected.targets[stage]].tolist()
        assert pairs == dict(zip(boxes, expected.queries[stage].tolist(), strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_costs_that_are_not_finite_do_not_change_the_choice_among_the_others(value):
    queries, boxes = [0, 1, 2, 4, 5, 6, 7], [0, 1, 3, 4]
    tables = 4 * torch.rand(300, 8, 5)
    tables[:, 3], tables[:, :, 2] = value, value
    finite = tables[:, queries][:, :, boxes].contiguous()
    _, query, box = matcher.assign_queries(finite, [4])
    expected = {
        (i, queries[q], boxes[b]) for i in range(300) for q, b in zip(query[i], box[i], strict=True)
    }
    _, query, box = matcher.assign_queries(tables, [5])
    pairs = {(i, int(q), int(b)) for i in range(300) for q, b in zip(query[i], box[i], strict=True)}
    assert {pair for pair in pairs if pair[2] != 2} == expected
    assert all(pair[1] != 3 for pair in pairs if pair[2] != 2)


# ---- modulated by position


def test_a_probability_is_scaled_by_the_root_of_the_fit(make_predictions):
    # GIoU of the first box 1, so u = 1; the second is half of the target: GIoU 0.5, u = 0.75
    target = Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]))
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.2, 0.4]]).view(1, 1, 2, 4)
    predictions = Predictions(torch.zeros(1, 1, 2, 1), boxes)
    cost = PositionModulatedMatcher(class_cost=1.0, bbox_cost=0.0, giou_cost=0.0)
    p = sqrt(0.75) / 2  # instead of 1/2
    expected = 0.25 * (1 - p) ** 2 * -log(p) + 0.75 * p**2 * log(1 - p)
    first, second = cost.costs(predictions, [target]).flatten().tolist()
    assert first == pytest.approx((0.25 - 0.75) * 0.25 * log(2), rel=1e-5)
    assert second == pytest.approx(expected, rel=1e-5)


def test_the_best_fit_of_an_image_counts_as_perfect(make_predictions):
    # the same pair as above, now the best of its image; u of 0.75 is 1 relative to it
    target = Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]))
    predictions = Predictions(torch.zeros(1, 1, 1, 1), torch.tensor([[[[0.5, 0.5, 0.2, 0.4]]]]))
    cost = PositionModulatedMatcher(bbox_cost=0.0, giou_cost=0.0).costs(predictions, [target])
    assert cost.item() == pytest.approx(2 * (0.25 - 0.75) * 0.25 * log(2), rel=1e-5)


def test_scaled_probabilities_are_exact_at_both_ends():
    logits = torch.tensor([-1e4, -20.0, 0.0, 3.0, 20.0, 1e4], dtype=torch.float64)
    halves = matcher.scale_probability(logits, torch.full_like(logits, 0.5))
    p = 0.5 * logits.sigmoid()
    torch.testing.assert_close(halves[1:], (p / (1 - p)).log()[1:])
    assert halves[0].item() == pytest.approx(-1e4 - log(2))  # where p is 0 in float64, too
    torch.testing.assert_close(matcher.scale_probability(logits, torch.ones_like(logits)), logits)


@EVERY
def test_costs_of_extreme_predictions_are_finite(make_predictions, make_targets, kind):
    predictions, targets = make_predictions(2, 1), make_targets(3)
    predictions.logits[0], predictions.logits[1] = 1e4, -1e4
    predictions.boxes[:, :, 0] = torch.tensor([0.0, 0.0, 0.0, 0.0])
    predictions.boxes[:, :, 1] = torch.tensor([1.0, 1.0, 1.0, 1.0])
    targets[0].boxes[1, 2:] = 0
    costs = kind().costs(predictions, targets)
    assert costs.isfinite().all() and costs.abs().max() < matcher.NOT_FINITE


def test_matches_are_on_the_cpu_where_they_are_found(make_predictions, make_targets, device):
    predictions = Predictions(*(x.to(device) for x in make_predictions(1, 1)))
    targets = [type(t)(*(x.to(device) for x in t)) for t in make_targets(2)]
    match = HungarianMatcher()(predictions, targets)
    assert isinstance(match, Match) and all(x.device.type == "cpu" for x in match)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (6, 1), (0, 0)], ids=str)
def test_every_box_finds_its_query(make_predictions, make_targets, counts):
    predictions = make_predictions(2, len(counts), num_queries=NUM_QUERIES)
    match = HungarianMatcher()(predictions, make_targets(*counts))
    table = queries_of_boxes(match, sum(counts))
    assert table.shape == (2, sum(counts))
    for stage in range(2):
        pairs = dict(zip(match.targets[stage].tolist(), match.queries[stage].tolist(), strict=True))
        assert table[stage].tolist() == [pairs.get(box, -1) for box in range(sum(counts))]


def test_instability_is_the_share_of_boxes_with_another_query_than_before():
    queries = torch.tensor(
        [
            [0, 1, 2, -1],
            [0, 2, 1, -1],  # two have exchanged theirs
            [0, 2, 1, 3],  # one has got a query
            [0, 2, 1, 3],
        ]
    )
    assert instability(queries).tolist() == [0.5, 0.25, 0]
    assert instability(queries[:1]).tolist() == []
