"""Several queries for a box: who stands for which, against loops and Detectron2's matcher."""

import math

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from outputs import detector_output, with_result
from test_syncs import waits  # noqa: F401

from dino_d2.boxes import cxcywh_to_xyxy, generalized_iou, iou
from dino_d2.modeling import AlignLoss, FocalLoss, HungarianMatcher, SetCriterion
from dino_d2.modeling.class_losses import PositionSupervisedLoss
from dino_d2.modeling.matcher import PositionModulatedMatcher
from dino_d2.modeling.one_to_many import (
    MixedMatching,
    OneToManyMatcher,
    OneToManyQueries,
    RepeatedMatcher,
)
from dino_d2.structures import Match, Predictions, Target, join_targets
from dino_d2.weights import model_zoo


def matched(match):
    """Of each stage the set of (image, query, box), each once."""
    stages = []
    for queries, boxes in zip(match.queries, match.targets, strict=True):
        pairs = torch.stack([match.images, queries, boxes], 1)[boxes >= 0].tolist()
        assert len(set(map(tuple, pairs))) == len(pairs)
        stages.append(set(map(tuple, pairs)))
    return stages


def slow_match(predictions, targets, iou_weight, threshold, max_queries):
    """Query by query; whether a query stands for its box is what Detectron2's matcher says."""
    stages = []
    for logits, boxes in zip(*predictions, strict=True):
        pairs, start = set(), 0
        for image, target in enumerate(targets):
            found = {}
            scores = torch.zeros(len(target.labels), boxes.shape[1])
            for box, label in enumerate(target.labels):
                for query in range(boxes.shape[1]):
                    corners = (cxcywh_to_xyxy(x) for x in (boxes[image, query], target.boxes[box]))
                    p = logits[image, query, label].sigmoid()
                    scores[box, query] = iou_weight * iou(*corners) + (1 - iou_weight) * p
            own, labels = Matcher([threshold], [0, 1], allow_low_quality_matches=True)(scores)
            for query in labels.nonzero().flatten().tolist():
                found.setdefault(int(own[query]), []).append(query)
            for box, queries in found.items():
                best = sorted(queries, key=lambda query: -scores[box, query])  # noqa: B023
                pairs |= {(image, query, start + box) for query in best[:max_queries]}
            start += len(target.labels)
        stages.append(pairs)
    return stages


@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("counts", [(2, 3), (0, 4, 1), (9,), (0, 0)], ids=str)
def test_queries_are_assigned_as_by_a_loop(make_predictions, make_targets, counts, threshold):
    targets = make_targets(*counts)
    predictions = make_predictions(3, len(counts), num_queries=7)  # of 9 boxes, two have none
    options = {"iou_weight": 0.7, "threshold": threshold, "max_queries": 2}
    match = OneToManyMatcher(**options)(predictions, targets)
    assert matched(match) == slow_match(predictions, targets, **options)
    assert (match.targets >= 0).any() == (sum(counts) > 0)


def test_a_query_stands_for_the_box_of_its_highest_score():
    # Two boxes side by side. With 0.8 IoU + 0.2 p, where p is 1/2 everywhere:
    boxes = torch.tensor([[0.2, 0.5, 0.2, 0.2], [0.6, 0.5, 0.2, 0.2]])
    predicted = [
        [0.20, 0.5, 0.2, 0.2],  # box 0, IoU 1: 0.9
        [0.25, 0.5, 0.2, 0.2],  # box 0, IoU 0.15 / 0.25: 0.58
        [0.30, 0.5, 0.2, 0.2],  # box 0, IoU 0.1 / 0.3: 0.37, too little
        [0.70, 0.5, 0.2, 0.2],  # box 1, IoU 0.1 / 0.3: 0.37, but its best
        [0.22, 0.5, 0.2, 0.2],  # box 0, IoU 0.18 / 0.22: 0.75
    ]
    predictions = Predictions(torch.zeros(1, 1, 5, 1), torch.tensor(predicted)[None, None])
    target = Target(torch.tensor([0, 0]), boxes)
    every = OneToManyMatcher(iou_weight=0.8)(predictions, [target])
    assert matched(every) == [{(0, 0, 0), (0, 4, 0), (0, 1, 0), (0, 3, 1)}]
    two = OneToManyMatcher(iou_weight=0.8, max_queries=2)(predictions, [target])
    assert matched(two) == [{(0, 0, 0), (0, 4, 0), (0, 3, 1)}]


@pytest.mark.parametrize("class_loss", [FocalLoss(), PositionSupervisedLoss()], ids=repr)
def test_losses_are_those_of_the_matches_alone(make_predictions, make_targets, class_loss):
    targets, stage = make_targets(3, 2), make_predictions(2, num_queries=20)
    matcher = OneToManyMatcher(threshold=0.3)
    criterion = SetCriterion(matcher=HungarianMatcher(), class_loss=class_loss)
    output = with_result(detector_output([stage]), match=matcher)
    (pairs,) = matched(matcher(Predictions(*(x[None] for x in stage)), targets))
    assert len(pairs) > len(join_targets(targets).labels)
    known = with_result(output, match=Match(*torch.tensor(sorted(pairs)).unbind(1)))
    torch.testing.assert_close(criterion(output, targets), criterion(known, targets))


def test_a_branch_may_have_other_weights_and_class_losses(make_predictions, make_targets):
    targets, stage = make_targets(3), make_predictions(1)
    criterion = SetCriterion(
        matcher=HungarianMatcher(), denoising_class_loss=AlignLoss(), denoising_class_weight=3.0
    )
    plain, doubled, noised = (
        criterion(with_result(detector_output([stage]), **fields), targets)
        for fields in ({}, {"class_weight": 2.0, "weight": 0.5}, {"denoising": True})
    )
    assert doubled["loss_class"] == plain["loss_class"]
    assert doubled["loss_giou"] == noised["loss_giou"] / 2 == plain["loss_giou"] / 2
    only = SetCriterion(matcher=HungarianMatcher(), class_loss=AlignLoss(), class_weight=3.0)
    assert noised["loss_class"] == only(detector_output([stage]), targets)["loss_class"]


def test_several_queries_stand_for_a_box(make_predictions, make_targets):
    targets = make_targets(2, 0, 1)
    match = RepeatedMatcher(HungarianMatcher(), repeats=3)(
        make_predictions(2, 3, num_queries=12), targets
    )
    for queries, boxes in zip(match.queries, match.targets, strict=True):
        assert torch.bincount(boxes).tolist() == [3, 3, 3]
        assert torch.equal(boxes == 2, match.images == 2)
        assert len(set(zip(match.images.tolist(), queries.tolist(), strict=True))) == 9


def test_no_box_goes_without_a_query_where_another_has_several(make_predictions, make_targets):
    targets = make_targets(4, 1)
    match = RepeatedMatcher(HungarianMatcher(), repeats=3)(
        make_predictions(1, 2, num_queries=6), targets
    )
    assert torch.bincount(match.targets[0]).tolist() == [1, 1, 1, 1, 3]


def slow_align_losses(stage, targets, match, tau):
    """The losses of a stage as Align-DETR's paper has them, pair by pair, before the weights."""
    totals = {"loss_class": 0.0, "loss_bbox": 0.0, "loss_giou": 0.0}
    truth, wanted = join_targets(targets), torch.zeros_like(stage.logits)
    strength = stage.logits.sigmoid() ** 2
    for box, label in enumerate(truth.labels):
        pairs = [(i, q) for i, q, t in match if t == box]
        fits = []
        for pair in pairs:
            overlap = iou(*(cxcywh_to_xyxy(x) for x in (stage.boxes[pair], truth.boxes[box])))
            fits.append((stage.logits[pair][label].sigmoid() ** 0.25 * overlap**0.75).clamp(0.01))
        for pair, fit in zip(pairs, fits, strict=True):
            weight = math.exp(-int(sum(x > fit for x in fits)) / tau)
            wanted[pair][label], strength[pair][label] = fit * weight, 1
            corners = [cxcywh_to_xyxy(x) for x in (stage.boxes[pair], truth.boxes[box])]
            totals["loss_bbox"] += weight * (stage.boxes[pair] - truth.boxes[box]).abs().sum()
            totals["loss_giou"] += weight * (1 - generalized_iou(*corners))
    p = stage.logits.sigmoid()
    totals["loss_class"] = -(strength * (wanted * p.log() + (1 - wanted) * (1 - p).log())).sum()
    return totals


@pytest.mark.parametrize("counts", [(3, 0, 2), (7,)], ids=str)
@pytest.mark.parametrize("two_stage", [True, False])
def test_mixed_matching_gives_the_losses_of_a_loop(
    make_predictions, make_targets, counts, two_stage
):
    targets, matcher = make_targets(*counts), HungarianMatcher()
    stages = [make_predictions(len(counts), num_queries=9) for _ in range(3)]
    criterion = MixedMatching(matcher=matcher, class_loss=AlignLoss(), repeats=3, tau=0.8)
    proposals = make_predictions(len(counts), num_queries=9) if two_stage else None
    losses = criterion(detector_output(stages, proposals), targets)
    several, weights = RepeatedMatcher(matcher, repeats=3), criterion.weights
    suffixes = {"_0": stages[0], "_1": stages[1], "": stages[2], "_enc": proposals}
    for suffix, stage in suffixes.items():
        if stage is not None:
            one = Predictions(*(x[None] for x in stage))
            (pairs,) = matched((several if suffix else matcher)(one, targets))
            for name, total in slow_align_losses(stage, targets, sorted(pairs), 0.8).items():
                expected = weights[name] * total / sum(counts)
                torch.testing.assert_close(losses[name + suffix], expected, rtol=1e-5, atol=1e-5)


def test_mixed_matching_leaves_denoising_and_other_branches_alone(make_predictions, make_targets):
    targets, stage = make_targets(3), make_predictions(1)
    pairs = Match(torch.tensor([0, 0]), torch.tensor([0, 4]), torch.tensor([2, 2]))
    output = with_result(detector_output([stage]), match=pairs, denoising=True, name="dn")
    mixed = MixedMatching(matcher=HungarianMatcher(), class_loss=AlignLoss())
    plain = SetCriterion(matcher=HungarianMatcher(), class_loss=AlignLoss())
    torch.testing.assert_close(mixed(output, targets), plain(output, targets), rtol=0, atol=0)


def test_mixed_matching_without_boxes(make_predictions, make_targets):
    criterion = MixedMatching(matcher=HungarianMatcher(), class_loss=AlignLoss())
    losses = criterion(detector_output([make_predictions(2)] * 2), make_targets(0, 0))
    assert losses["loss_bbox_0"] == losses["loss_giou"] == 0 < losses["loss_class"]


@pytest.mark.parametrize("counts", [(3, 2), (0, 0)], ids=str)
def test_the_assignment_does_not_wait_for_the_device(waits, make_targets, counts):  # noqa: F811
    with torch.device("cuda"):
        targets = make_targets(*counts)
        predictions = Predictions(torch.rand(2, 2, 20, 3), torch.rand(2, 2, 20, 4))
    waits.clear()
    assert OneToManyMatcher()(predictions, targets).targets.is_cuda
    assert not waits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iou_weight": 1.1}, "iou_weight is 1.1; it has to be a number from 0 to 1"),
        ({"threshold": -1}, "threshold is -1; it has to be a number from 0 to 1"),
        ({"max_queries": 0}, "max_queries is 0; it has to be a whole number from 1 on"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OneToManyMatcher(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_loss": FocalLoss()}, "and the class loss is FocalLoss: choose AlignLoss, or"),
        ({"class_loss": AlignLoss(), "tau": 0}, "tau is 0; it has to be a finite number above 0"),
        ({"class_loss": AlignLoss(), "repeats": 0}, "repeats is 0; it has to be a whole number"),
    ],
)
def test_mixed_matching_says_what_it_needs(options, message):
    with pytest.raises(ValueError, match=message):
        MixedMatching(matcher=HungarianMatcher(), **options)


def test_further_queries_are_matched_as_the_config_says():
    cfg = model_zoo.get_config("quickstart")
    cfg.MODEL.DINO.MATCHER.NAME, cfg.MODEL.DINO.MATCHER.GIOU_COST = "PositionModulatedMatcher", 7.0
    matcher = OneToManyQueries(cfg, 3).matcher.matcher
    assert type(matcher) is PositionModulatedMatcher and matcher.giou_cost == 7
