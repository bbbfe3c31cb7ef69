"""Losses of classes: what each costs, by closed forms and by loops over all logits in float64."""

from math import log

import pytest
import torch
from outputs import detector_output
from test_syncs import waits  # noqa: F401

from dino_d2.modeling import (
    AlignLoss,
    FocalLoss,
    HungarianMatcher,
    MatchabilityAwareLoss,
    PositionModulatedMatcher,
    PositionSupervisedLoss,
    SetCriterion,
    VarifocalLoss,
)
from dino_d2.modeling.class_losses import ClassLoss
from dino_d2.structures import Target

LOSSES = [FocalLoss, VarifocalLoss, PositionSupervisedLoss, AlignLoss, MatchabilityAwareLoss]
EVERY = pytest.mark.parametrize("kind", LOSSES, ids=lambda kind: kind.__name__)
BACKGROUND = {
    FocalLoss: 0.75,
    VarifocalLoss: 0.75,
    PositionSupervisedLoss: 0.75,
    AlignLoss: 1.0,
    MatchabilityAwareLoss: 1.0,
}
GAMMA = dict.fromkeys(LOSSES, 2.0) | {MatchabilityAwareLoss: 1.5}


@pytest.fixture
def pairs():
    """Logits (2, 3, 5, 4) of two stages and three images; of the images 2, 0 and 3 pairs."""
    logits = 2 * torch.randn(2, 3, 5, 4)
    stages = torch.arange(2)[:, None]
    images = torch.tensor([0, 0, 2, 2, 2])
    queries = torch.tensor([[0, 3, 1, 4, 2], [4, 0, 0, 2, 3]])
    classes = torch.tensor([[1, 1, 0, 3, 2], [1, 1, 2, 0, 3]])
    iou = 0.1 + 0.9 * torch.rand(2, 5)
    return logits, (stages, images, queries, classes), iou


def of_pair(kind, x, iou, best):
    """The cost of one logit of an object, after the papers, in elementary functions."""
    p = 1 / (1 + (-x).exp())

    def cross_entropy(target):
        return -target * p.log() - (1 - target) * (1 - p).log()

    if kind is FocalLoss:
        return -0.25 * (1 - p) ** 2 * p.log()
    if kind is VarifocalLoss:
        return iou * cross_entropy(iou)
    if kind is PositionSupervisedLoss:
        target = iou**2 / best**2
        return 0.25 * (target - p) ** 2 * cross_entropy(target)
    if kind is MatchabilityAwareLoss:
        return cross_entropy(iou**1.5)
    return cross_entropy(max(p.detach() ** 0.25 * iou**0.75, 0.01))


def slow_loss(kind, logits, matched, iou):
    """Logit by logit; the sum of each stage."""
    _, images, queries, classes = matched
    sums = []
    for stage, of_stage in enumerate(logits):
        objects = {
            tuple(map(int, place)): pair
            for pair, place in enumerate(zip(images, queries[stage], classes[stage], strict=True))
        }
        total = 0.0
        for image, of_image in enumerate(of_stage):
            own = [iou[stage, pair].item() for place, pair in objects.items() if place[0] == image]
            for query, of_query in enumerate(of_image):
                for k, x in enumerate(of_query):
                    pair = objects.get((image, query, k))
                    if pair is None:
                        p = 1 / (1 + (-x).exp())
                        total = total - BACKGROUND[kind] * p ** GAMMA[kind] * (1 - p).log()
                    else:
                        total = total + of_pair(kind, x, iou[stage, pair].item(), max(own))
        sums.append(total)
    return torch.stack(sums)


# ---- values


def one_pair(kind, x, iou, **options):
    """The loss of a single logit, that of an object."""
    zero = torch.tensor([0])
    logits = torch.full((1, 1, 1, 1), x)
    return kind(**options)(logits, (zero[:, None], zero, zero, zero), torch.tensor([[iou]])).item()


@pytest.mark.parametrize(
    ("kind", "x", "iou", "expected"),
    [
        # p = 1/2; the box does not matter
        (FocalLoss, 0.0, 0.1, 0.25 * 0.5**2 * log(2)),
        (FocalLoss, 0.0, 0.9, 0.25 * 0.5**2 * log(2)),
        # p = 3/4 and the target is 0.8
        (VarifocalLoss, log(3), 0.8, 0.8 * (-0.8 * log(0.75) - 0.2 * log(0.25))),
        # a box that misses is background: alpha * p^2 * -log(1 - p)
        (VarifocalLoss, log(3), 0.0, 0.75 * 0.75**2 * log(4)),
        # the best of its image: the target is 1 whatever the IoU
        (PositionSupervisedLoss, log(3), 0.3, 0.25 * (1 - 0.75) ** 2 * -log(0.75)),
        # no pair of the image has any overlap: the target is 0
        (PositionSupervisedLoss, log(3), 0.0, 0.25 * 0.75**2 * -log(0.25)),
        # p = 1/16, the fourth root is 1/2; IoU 1/16, 1/8 of it remains: the target is 1/16
        (AlignLoss, -log(15), 1 / 16, -1 / 16 * log(1 / 16) - 15 / 16 * log(15 / 16)),
        # IoU 1/4: the target is 1/8
        (MatchabilityAwareLoss, log(3), 0.25, -0.125 * log(0.75) - 0.875 * log(0.25)),
        # a box that misses is background: p^1.5 * -log(1 - p)
        (MatchabilityAwareLoss, log(3), 0.0, 0.75**1.5 * log(4)),
        # 0.01 at least
        (AlignLoss, log(3), 0.0, -0.01 * log(0.75) - 0.99 * log(0.25)),
    ],
)
def test_a_pair_costs_what_the_paper_says(kind, x, iou, expected):
    assert one_pair(kind, x, iou) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (FocalLoss, {"alpha": 0.6, "gamma": 1.0}, 0.6 * 0.25 * -log(0.75)),
        # 0.3 is the weight of background: the pair itself does not know of it
        (VarifocalLoss, {"alpha": 0.3}, 0.5 * (-0.5 * log(0.75) - 0.5 * log(0.25))),
        (PositionSupervisedLoss, {"alpha": 0.6, "gamma": 1.0}, 0.6 * 0.25 * -log(0.75)),
        # gamma is that of the target, too
        (MatchabilityAwareLoss, {"alpha": 3.0, "gamma": 2.0}, -0.25 * log(0.75) - 0.75 * log(0.25)),
        (AlignLoss, {"alpha": 0.0}, -0.5 * log(0.75) - 0.5 * log(0.25)),  # the IoU alone
        (AlignLoss, {"alpha": 1.0}, -0.75 * log(0.75) - 0.25 * log(0.25)),  # p alone
    ],
)
def test_alpha_and_gamma_are_those_of_the_paper(kind, options, expected):
    # p = 3/4, IoU 1/2
    assert one_pair(kind, log(3), 0.5, **options) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "weight"),
    [
        (FocalLoss, {}, 0.75),
        (FocalLoss, {"alpha": 0.6}, 0.4),
        (VarifocalLoss, {}, 0.75),
        (VarifocalLoss, {"alpha": 1.5}, 1.5),
        (PositionSupervisedLoss, {}, 0.75),
        (PositionSupervisedLoss, {"alpha": 0.6}, 0.4),
        (AlignLoss, {}, 1.0),
        (AlignLoss, {"alpha": 0.6}, 1.0),
        (MatchabilityAwareLoss, {}, 1.0),
        (MatchabilityAwareLoss, {"alpha": 1.5}, 1.5),
    ],
)
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_background_costs_its_weight_times_that_of_the_focal_loss(kind, options, weight, gamma):
    none = torch.zeros(0, dtype=torch.int64)
    loss = kind(gamma=gamma, **options)
    logits = torch.tensor([0.0, log(3)]).view(2, 1, 1, 1)  # p = 1/2 and 3/4, no pair
    stages = torch.arange(2)[:, None]
    actual = loss(logits, (stages, none, none, none), torch.zeros(2, 0))
    expected = [weight * 0.5**gamma * log(2), weight * 0.75**gamma * log(4)]
    assert actual.tolist() == pytest.approx(expected, rel=1e-5)


def test_targets_of_position_supervision_are_relative_to_the_best_pair_of_image_and_stage():
    # Of image 0 the pairs have IoUs of 0.4 and 0.8, that of image 1 has 0.2; in the other stage the
    # first has 0.8 and the second 0.4. So targets are 0.25 and 1, and 1 for the only pair.
    images, queries = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    iou = torch.tensor([[0.4, 0.8, 0.2], [0.8, 0.4, 0.2]])
    loss = PositionSupervisedLoss()
    actual = loss(
        torch.zeros(2, 2, 2, 1),
        (torch.arange(2)[:, None], images, queries, torch.zeros_like(images)),
        iou,
    )
    # p = 1/2: the cross entropy is log 2 whatever the target; the fourth logit is background
    pairs = 0.25 * (0.25**2 + 0.5**2 + 0.5**2) * log(2)
    assert actual.tolist() == pytest.approx([pairs + 0.75 * 0.25 * log(2)] * 2, rel=1e-5)


@EVERY
def test_values_and_gradients_are_those_of_a_loop_over_all_logits(kind, pairs):
    logits, matched, iou = pairs
    results = []
    for function in (kind(), lambda *args: slow_loss(kind, *args)):
        x = logits.double().requires_grad_()
        sums = function(x, matched, iou.double())
        (gradient,) = torch.autograd.grad(sums @ torch.tensor([1.0, 3.0], dtype=x.dtype), x)
        results.append((sums.detach(), gradient))
    # fvcore's focal loss is computed in float32
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@EVERY
def test_a_pair_without_weight_is_background_and_no_best_of_its_image(kind, pairs):
    logits, (stages, images, queries, classes), iou = pairs
    iou[:, 4] = 1.0
    kept = (stages, images[:4], queries[:, :4], classes[:, :4]), iou[:, :4]
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    weighted = kind()(logits, (stages, images, queries, classes), iou, weights)
    torch.testing.assert_close(weighted, kind()(logits, *kept))


@EVERY
def test_matches_that_all_stages_share_are_broadcast(kind, pairs):
    logits, (stages, images, queries, classes), iou = pairs
    shared = stages, images, queries[0], classes[0]  # as of denoising queries
    spelled = stages, images, queries[:1].expand(2, -1), classes[:1].expand(2, -1)
    torch.testing.assert_close(kind()(logits, shared, iou), kind()(logits, spelled, iou))


# ---- where formulas break


@EVERY
def test_extreme_logits_have_finite_losses_and_gradients(kind, pairs):
    (_, matched, iou), extremes = pairs, torch.tensor([-1e4, -100.0, 100.0, 1e4])
    for fit in (0.0, 0.5, 1.0):
        # One extreme per image, so that with pairs and as background each is seen alone.
        for logits in (extremes[:3], extremes[1:]):
            logits = logits[:, None, None].expand(2, 3, 5, 4).clone().requires_grad_()
            loss = kind()(logits, matched, torch.full_like(iou, fit))
            loss.sum().backward()
            assert loss.isfinite().all() and logits.grad.isfinite().all()


def test_a_sure_miss_costs_as_much_as_its_logit():
    # q * (q * 0 + (1 - q) * x), t = 1 for the only pair and p = 0, and t = 0.01
    assert one_pair(VarifocalLoss, 1e4, 0.5) == pytest.approx(0.5 * 0.5 * 1e4, rel=1e-3)
    assert one_pair(PositionSupervisedLoss, -1e4, 0.5) == pytest.approx(0.25 * 1e4, rel=1e-3)
    assert one_pair(AlignLoss, -1e4, 0.5) == pytest.approx(0.01 * 1e4, rel=1e-3)


@EVERY
def test_logits_that_are_not_finite_have_such_a_loss(kind, pairs):
    logits, matched, iou = pairs
    for place in [(0, 0, 0, 1), (0, 0, 0, 0)]:  # of a pair, and of background
        for value in (torch.nan, torch.inf):
            broken = logits.clone()
            broken[place] = value
            first, second = kind()(broken, matched, iou)
            assert not first.isfinite() and second.isfinite()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FocalLoss, {"alpha": -1}, "alpha of FocalLoss is -1; it has to be between 0 and 1"),
        (FocalLoss, {"alpha": 1.5}, "alpha of FocalLoss is 1.5"),
        (PositionSupervisedLoss, {"alpha": 2}, "alpha of PositionSupervisedLoss is 2"),
        (AlignLoss, {"alpha": 1.1}, "alpha of AlignLoss is 1.1"),
        (VarifocalLoss, {"alpha": -0.1}, "alpha of VarifocalLoss is -0.1"),
        (AlignLoss, {"gamma": -1}, "gamma of AlignLoss is -1; it has to be at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_loss_that_does_not_say_what_objects_cost_is_none(pairs):
    with pytest.raises(NotImplementedError):
        ClassLoss(alpha=0.5, gamma=2.0, background=1.0)(*pairs)


# ---- in the criterion


@EVERY
def test_the_criterion_passes_the_iou_of_matched_boxes(make_predictions, kind):
    target = Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]))
    prediction = make_predictions(1, num_queries=1, num_classes=2)
    prediction.logits[:] = log(3)
    prediction.boxes[:] = torch.tensor([0.5, 0.5, 0.2, 0.4])  # half of the target, inside it
    criterion = SetCriterion(matcher=HungarianMatcher(), class_loss=kind())
    losses = criterion(detector_output([prediction], None, [], None), [target])
    background = BACKGROUND[kind] * 0.75 ** GAMMA[kind] * log(4)
    expected = one_pair(kind, log(3), 0.5) + background
    assert losses["loss_class"].item() == pytest.approx(expected, rel=1e-5)


@EVERY
def test_the_class_loss_moves_no_box(make_predictions, make_targets, kind):
    targets, stage = make_targets(2, 1), make_predictions(2)
    for x in stage:
        x.requires_grad_()
    criterion = SetCriterion(matcher=HungarianMatcher(), class_loss=kind())
    loss = criterion(detector_output([stage], None, [], None), targets)["loss_class"]
    gradients = torch.autograd.grad(loss, stage, allow_unused=True)
    assert gradients[0].any() and gradients[1] is None


@EVERY
def test_without_boxes_everything_is_background(make_predictions, make_targets, kind):
    targets, stage = make_targets(0, 0), make_predictions(2)
    criterion = SetCriterion(matcher=HungarianMatcher(), class_loss=kind())
    loss = criterion(detector_output([stage], None, [], None), targets)["loss_class"]
    p = stage.logits.sigmoid()
    torch.testing.assert_close(loss, BACKGROUND[kind] * (p ** GAMMA[kind] * -(1 - p).log()).sum())


def use(model, kind):
    matcher = PositionModulatedMatcher()
    model.criterion = SetCriterion(matcher=matcher, class_loss=kind(), class_weight=2.0)
    return model


@pytest.mark.slow
@EVERY
def test_a_few_steps_of_training_lower_the_losses(make_dino, make_batch, kind):
    model, batch = use(make_dino(), kind), make_batch(2, 0, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(25):
        torch.manual_seed(1)  # the same noise
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert history[-1] < 0.9 * history[0]


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("counts", [(3, 2), (0, 0)], ids=str)
def test_no_loss_waits_for_the_device(waits, make_dino, make_batch, kind, counts):  # noqa: F811
    with torch.device("cuda"):
        model = use(make_dino(), kind)
    batch = make_batch(*counts)
    waits.clear()  # of building
    model(batch)
    (wait,) = waits
    assert "costs.cpu()" in wait


@pytest.mark.slow
@EVERY
def test_every_loss_is_one_graph(kind, pairs):
    results = []
    for loss in (kind(), torch.compile(kind(), backend="aot_eager", fullgraph=True)):
        logits = pairs[0].clone().requires_grad_()
        value = loss(logits, *pairs[1:])
        results.append((value.detach(), *torch.autograd.grad(value.sum(), logits)))
    torch.compiler.reset()
    torch.testing.assert_close(*results)
