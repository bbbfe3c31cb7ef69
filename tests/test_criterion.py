from math import log

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss as fvcore_loss
from outputs import detector_output, with_result
from torch import distributed
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from dino_d2.boxes import cxcywh_to_xyxy
from dino_d2.modeling import (
    AlignLoss,
    ContrastiveDenoising,
    FocalLoss,
    HungarianMatcher,
    SetCriterion,
    VarifocalLoss,
)
from dino_d2.modeling.class_losses import BackgroundLoss
from dino_d2.modeling.criterion import AllProposals, BoxesOnly, average_over_workers
from dino_d2.structures import DetectorOutput, Predictions, Target

NUM_CLASSES = 3
KINDS = ("loss_class", "loss_bbox", "loss_giou")


def make_criterion(**options):
    return SetCriterion(matcher=HungarianMatcher(), **options)


@pytest.fixture
def make_output(make_predictions):
    """Three layers, with proposals and with two denoising groups unless left out."""

    def make(targets, proposals=True, denoising=True):
        batch = len(targets)
        noised = None
        if denoising:
            slots = max(1, *(len(target.labels) for target in targets))
            noised = ContrastiveDenoising(num_classes=NUM_CLASSES, embed_dim=8, budget=2 * slots)
            noised = noised(targets)
        denoised = [
            make_predictions(batch, num_queries=len(noised.groups)) for _ in range(3) if denoising
        ]
        return detector_output(
            [make_predictions(batch) for _ in range(3)],
            make_predictions(batch, num_queries=5) if proposals else None,
            denoised,
            noised,
        )

    return make


def slow_losses(predictions, targets, pairs, num_boxes):
    """Of one stage, image by image and pair by pair: `pairs` are (image, query, box of image)."""
    classes = torch.zeros_like(predictions.logits)
    bbox = giou = 0.0
    for image, query, box in pairs:
        target = targets[image]
        classes[image, query, target.labels[box]] = 1
        a, b = predictions.boxes[image, query], target.boxes[box]
        bbox = bbox + sum(abs(x - y) for x, y in zip(a, b, strict=True))
        giou = giou + generalized_box_iou_loss(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b))
    focal = sum(
        sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2.0).sum()
        for logits, wanted in zip(predictions.logits, classes, strict=True)
    )
    return {
        "loss_class": focal / num_boxes,
        "loss_bbox": 5 * bbox / num_boxes,
        "loss_giou": 2 * giou / num_boxes,
    }


def matched_pairs(predictions, targets):
    """By running the matcher on every image alone."""
    for image, target in enumerate(targets):
        alone = Predictions(*(x[None, image : image + 1] for x in predictions))
        _, queries, boxes = HungarianMatcher()(alone, [target])
        yield from ((image, int(q), int(b)) for q, b in zip(queries[0], boxes[0], strict=True))


# ---- values


@pytest.mark.parametrize("stage", ["layers", "proposals", "denoised"])
def test_losses_of_one_query_and_one_box(stage):
    target = Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]))
    prediction = Predictions(torch.zeros(1, 1, 2), torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]))
    # as positive and negative: the second query of the denoising part has no box
    twice = Predictions(*(x.repeat(1, 2, 1) for x in prediction))
    noised = ContrastiveDenoising(num_classes=2, embed_dim=8, budget=1)([target])
    losses = make_criterion()(detector_output([prediction], prediction, [twice], noised), [target])
    suffix = {"layers": "", "proposals": "_enc", "denoised": "_dn"}[stage]
    # all probabilities are 1/2: 0.25 * 0.5^2 * log 2 for the class that is, 0.75 * ... for others
    there, absent = (alpha * 0.25 * log(2) for alpha in (0.25, 0.75))
    negative = 2 * absent if stage == "denoised" else 0
    assert losses["loss_class" + suffix].item() == pytest.approx(there + absent + negative)
    # width and height are 0.2 off
    assert losses["loss_bbox" + suffix].item() == pytest.approx(5 * 0.4)
    # a quarter of the target, inside it
    assert losses["loss_giou" + suffix].item() == pytest.approx(2 * (1 - 0.25))


@pytest.mark.parametrize("counts", [(2, 3), (0, 4, 1), (7,)], ids=str)
def test_losses_are_those_of_a_loop_over_stages_and_images(make_targets, make_output, counts):
    targets = make_targets(*counts)
    output = make_output(targets)
    losses = make_criterion()(output, targets)
    names = ["_0", "_1", "", "_enc"]
    for suffix, stage in zip(names, [*output.result.layers, output.result.proposals], strict=True):
        pairs = list(matched_pairs(stage, targets))
        for name, expected in slow_losses(stage, targets, pairs, sum(counts)).items():
            torch.testing.assert_close(losses.pop(name + suffix), expected)

    slots = max(counts)
    pairs = [
        (image, group * 2 * slots + box, box)
        for image, count in enumerate(counts)
        for group in range(2)
        for box in range(count)
    ]
    for suffix, stage in zip(["_dn_0", "_dn_1", "_dn"], output.named("dn").layers, strict=True):
        # divided by boxes times groups
        for name, expected in slow_losses(stage, targets, pairs, 2 * sum(counts)).items():
            torch.testing.assert_close(losses.pop(name + suffix), expected)
    assert not losses


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_the_loss_of_background_and_its_gradient_are_those_of_the_focal_loss(gamma):
    logits = 10 * torch.randn(3, 2, 5, 4)
    logits[0, 0, 0] = torch.tensor([-200.0, -30.0, 30.0, 200.0])  # where naive formulas overflow
    results = []
    for loss in (
        lambda x: BackgroundLoss.apply(x, gamma),
        lambda x: fvcore_loss(x, torch.zeros_like(x), alpha=-1, gamma=gamma).sum((1, 2, 3)),
    ):
        x = logits.clone().requires_grad_()
        value = loss(x)
        results.append((value.detach(), *torch.autograd.grad(value @ torch.arange(1.0, 4), x)))
    torch.testing.assert_close(*results)


def test_the_gradient_of_the_loss_of_background_is_its_derivative():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(BackgroundLoss.apply, (logits, 2.0))


def test_the_loss_of_background_keeps_nothing_but_the_logits(make_predictions):
    logits, kept = make_predictions(2, 3).logits.requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        BackgroundLoss.apply(logits, 2.0)
    assert len(kept) == 1 and kept[0].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.0)])
def test_gradients_are_those_of_the_loop(make_targets, make_output, alpha, gamma):
    targets = make_targets(2, 3)
    output = make_output(targets, proposals=False, denoising=False)
    stage = output.result.layers[0]
    stage.logits.requires_grad_()
    criterion = make_criterion(class_loss=FocalLoss(alpha=alpha, gamma=gamma))
    one_hot = torch.zeros_like(stage.logits)
    for image, query, box in matched_pairs(Predictions(*map(torch.detach, stage)), targets):
        one_hot[image, query, targets[image].labels[box]] = 1
    expected = fvcore_loss(stage.logits, one_hot, alpha, gamma, "sum") / 5
    ours = criterion(output, targets)["loss_class_0"]
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(loss, stage.logits) for loss in (ours, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", KINDS)
def test_a_weight_scales_its_own_loss_at_every_stage(make_targets, make_output, name):
    targets = make_targets(2, 1)
    output = make_output(targets)
    before = make_criterion(class_weight=1.0, bbox_weight=1.0, giou_weight=1.0)(output, targets)
    weights = {"class_weight": 1.0, "bbox_weight": 1.0, "giou_weight": 1.0}
    weights[name.removeprefix("loss_") + "_weight"] = 3.0
    for key, loss in make_criterion(**weights)(output, targets).items():
        factor = 3 if key.startswith(name) else 1
        torch.testing.assert_close(loss, factor * before[key])


def test_denoising_queries_may_have_another_weight_of_the_class_loss(make_targets, make_output):
    targets = make_targets(2, 1)
    output = make_output(targets)
    before = make_criterion(class_weight=2.0)(output, targets)
    criterion = make_criterion(class_weight=2.0, denoising_class_weight=0.5)
    for name, loss in criterion(output, targets).items():
        factor = 0.25 if name.startswith("loss_class_dn") else 1
        torch.testing.assert_close(loss, factor * before[name])


def test_the_weight_of_a_part_may_be_zero(make_targets, make_output):
    targets = make_targets(2, 1)
    losses = make_criterion(denoising_class_weight=0.0)(make_output(targets), targets)
    for name, loss in losses.items():
        assert (loss == 0) == name.startswith("loss_class_dn")


def test_denoising_queries_may_have_another_class_loss(make_targets, make_output):
    targets = make_targets(2, 1)
    output = make_output(targets)
    focal, align, both = (
        make_criterion(**options)(output, targets)
        for options in (
            {"class_loss": FocalLoss()},
            {"class_loss": AlignLoss()},
            {"class_loss": AlignLoss(), "denoising_class_loss": FocalLoss()},
        )
    )
    for name, loss in both.items():
        assert torch.equal(loss, (focal if "_dn" in name else align)[name])
        if name.startswith("loss_class"):
            assert focal[name] != align[name]


def test_class_losses_are_shown_and_have_no_parameters():
    criterion = make_criterion(class_loss=VarifocalLoss(alpha=0.5))
    assert "VarifocalLoss(alpha=0.5, gamma=2.0)" in repr(criterion)
    assert not criterion.state_dict()


@pytest.mark.parametrize("proposals", [True, False])
@pytest.mark.parametrize("denoising", [True, False])
def test_losses_are_named_after_their_stage(make_targets, make_output, proposals, denoising):
    targets = make_targets(2, 1)
    losses = make_criterion()(make_output(targets, proposals, denoising), targets)
    suffixes = ["", "_0", "_1"] + ["_enc"] * proposals + ["_dn", "_dn_0", "_dn_1"] * denoising
    assert set(losses) == {kind + suffix for kind in KINDS for suffix in suffixes}
    assert all(loss.shape == () and loss > 0 for loss in losses.values())


def test_matching_and_denoising_losses_see_only_their_own_queries(make_targets, make_output):
    targets = make_targets(2, 1)
    output, other = make_output(targets), make_output(targets)
    losses = make_criterion()(output, targets)
    swapped = make_criterion()(DetectorOutput([output.result, other.named("dn")]), targets)
    for name, loss in losses.items():
        assert torch.equal(loss, swapped[name]) == ("_dn" not in name)


# ---- without boxes


def test_without_boxes_only_matching_queries_have_a_loss(make_targets, make_output):
    targets = make_targets(0, 0)
    losses = make_criterion()(make_output(targets), targets)
    for name, loss in losses.items():
        assert (loss > 0) == (name.startswith("loss_class") and "_dn" not in name)


def test_without_boxes_every_prediction_still_gets_a_gradient(make_targets, make_output):
    targets = make_targets(0, 0)
    output = make_output(targets)
    predictions = [*output.result.layers, output.result.proposals, *output.named("dn").layers]
    leaves = [x.requires_grad_() for stage in predictions for x in stage]
    sum(make_criterion()(output, targets).values()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
    assert not any(x.grad.any() for stage in output.named("dn").layers for x in stage)


# ---- what is not finite


BROKEN = pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
CRITERIA = pytest.mark.parametrize("kind", [SetCriterion, AllProposals, BoxesOnly])


@CRITERIA
@pytest.mark.parametrize(
    ("value", "field", "counts"),
    [
        (torch.nan, 0, (2, 3)),
        (torch.inf, 1, (2, 3)),
        (torch.nan, 1, (7, 0)),  # more boxes than queries
        (torch.inf, 0, (0, 0)),
    ],
    ids=str,
)
def test_a_broken_prediction_breaks_the_loss_and_nothing_else(
    make_targets, make_output, kind, value, field, counts
):
    targets = make_targets(*counts)
    output = make_output(targets)
    criterion = kind(matcher=HungarianMatcher())
    assert sum(criterion(output, targets).values()).isfinite()
    for stage in (output.result.layers[0], output.result.layers[-1], output.result.proposals):
        of_query = stage[field][1]  # five queries: with and without a box
        for query in range(len(of_query)):
            kept = of_query[query, 2].clone()
            of_query[query, 2] = value
            losses = criterion(output, targets)
            of_query[query, 2] = kept
            assert not sum(losses.values()).isfinite()
            assert sum(not loss.isfinite() for loss in losses.values()) <= 3  # its own stage


@BROKEN
@pytest.mark.parametrize("field", [0, 1], ids=Predictions._fields)
def test_a_broken_denoising_query_breaks_the_loss(make_targets, make_output, value, field):
    targets = make_targets(1, 3)
    output = make_output(targets)
    for query in range(len(output.named("dn").groups)):  # positive, negative, empty
        kept = output.named("dn").layers[1][field][0, query].clone()
        output.named("dn").layers[1][field][0, query] = value
        losses = make_criterion()(output, targets)
        output.named("dn").layers[1][field][0, query] = kept
        broken = {name for name, loss in losses.items() if not loss.isfinite()}
        assert broken and all(name.endswith("_dn_1") for name in broken)


@CRITERIA
@pytest.mark.parametrize(
    ("value", "counts", "denoising"),
    [
        (torch.nan, (2, 3), True),
        (torch.inf, (2, 3), False),
        (torch.nan, (9, 1), False),  # more boxes than queries
    ],
    ids=str,
)
def test_a_broken_box_breaks_the_loss(make_targets, make_output, kind, value, counts, denoising):
    targets = make_targets(*counts)
    output = make_output(targets, denoising=denoising)
    for box in range(counts[0]):
        boxes = targets[0].boxes.clone()
        boxes[box, 3] = value
        broken = [targets[0]._replace(boxes=boxes), targets[1]]
        losses = kind(matcher=HungarianMatcher())(output, broken)
        assert not sum(losses.values()).isfinite()


@pytest.mark.parametrize("broken", ["weights", "boxes"])
def test_a_broken_training_step_gives_losses_that_are_not_finite(make_dino, make_batch, broken):
    model, batch = make_dino(), make_batch(3, 2)
    if broken == "weights":
        torch.nn.init.constant_(model.encoder.level_embed.weight, torch.nan)
    else:
        batch[1]["instances"].gt_boxes.tensor[0, 2] = torch.nan
    assert not sum(model(batch).values()).isfinite()


# ---- workers


@pytest.mark.parametrize(("count", "expected"), [(0.0, 1.0), (1.0, 1.0), (7.0, 7.0)])
def test_alone_the_box_count_is_at_least_one(count, expected):
    assert average_over_workers(torch.tensor(count)).item() == expected


def test_losses_are_divided_by_the_mean_count_of_all_workers(
    make_targets, make_output, monkeypatch
):
    targets = make_targets(2, 1)
    output = make_output(targets)
    alone = make_criterion()(output, targets)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    # the other worker has nine boxes: (3 + 9) / 2 is twice what this one has
    monkeypatch.setattr(distributed, "all_reduce", lambda count: count.add_(9))
    for name, loss in make_criterion()(output, targets).items():
        torch.testing.assert_close(loss, alone[name] / 2)


@CRITERIA
def test_workers_talk_once_per_step(make_targets, make_output, monkeypatch, kind):
    targets, counts = make_targets(2, 1), []
    output = make_output(targets)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda count: counts.append(count.item()))
    kind(matcher=HungarianMatcher())(output, targets)
    assert counts == [3]


# ---- instability of the matching


def logged(criterion, output, targets):
    with EventStorage() as storage:
        criterion(output, targets)
    return {name: value for name, (value, _) in storage.latest().items()}


def slow_instability(before, after, targets):
    """Share of the boxes that have another query, matched stage by stage and image by image."""
    first, second = (set(matched_pairs(stage, targets)) for stage in (before, after))
    return len(first - second) / len(first)


@pytest.mark.parametrize("proposals", [True, False])
def test_instability_is_logged_from_stage_to_stage(make_targets, make_output, proposals):
    targets = make_targets(4, 0, 3)
    output = make_output(targets, proposals=proposals)
    expected = {
        f"matching/instability_{i}": slow_instability(*output.result.layers[i - 1 : i + 1], targets)
        for i in (1, 2)
    }
    if proposals:
        pair = output.result.proposals, output.result.layers[0]
        expected["matching/instability_0"] = slow_instability(*pair, targets)
    assert len(set(expected.values())) > 1
    assert logged(make_criterion(), output, targets) == pytest.approx(expected)


def test_layers_that_agree_are_stable(make_targets, make_output):
    targets = make_targets(3)
    output = make_output(targets)
    first = output.result.layers[0]
    same = with_result(output, layers=[first] * 3, proposals=first)
    assert set(logged(make_criterion(), same, targets).values()) == {0.0}


def test_without_boxes_nothing_is_logged(make_targets, make_output):
    targets = make_targets(0, 0)
    assert logged(make_criterion(), make_output(targets), targets) == {}


def test_proposals_of_objects_of_any_class_are_not_compared_with_the_layers(
    make_targets, make_output
):
    targets = make_targets(3)
    names = logged(AllProposals(matcher=HungarianMatcher()), make_output(targets), targets)
    assert set(names) == {"matching/instability_1", "matching/instability_2"}


def test_batches_of_a_step_are_logged_one_by_one(make_targets, make_output):
    targets = make_targets(3)
    output = make_output(targets)
    same = with_result(output, layers=[output.result.layers[0]] * 3)
    with EventStorage() as storage:
        for x in (same, output):
            make_criterion()(x, targets)
        values = [value for value, _ in storage.history("matching/instability_1").values()]
    assert values == [0.0, pytest.approx(slow_instability(*output.result.layers[:2], targets))]
