import pytest
import torch

from dino_d2.boxes import cxcywh_to_xyxy
from dino_d2.modeling import ContrastiveDenoising, Denoising
from dino_d2.modeling.branches import group_attn_mask, join_groups
from dino_d2.modeling.denoising import noise_boxes
from dino_d2.structures import Target

NUM_CLASSES = 4
KINDS = pytest.mark.parametrize("kind", [Denoising, ContrastiveDenoising])


def make_denoising(kind=ContrastiveDenoising, **options):
    """Its label embedding is the number of the label, NUM_CLASSES stands for an empty slot."""
    denoising = kind(num_classes=NUM_CLASSES, embed_dim=1, **options)
    denoising.label_embed.weight.data = torch.arange(NUM_CLASSES + 1.0)[:, None]
    return denoising


def labels_of(noised):
    return noised.queries.content.squeeze(-1).round().long()


def corner_shifts(reference, boxes):
    """How far both corners moved, in half the size of the box."""
    moved = cxcywh_to_xyxy(reference) - cxcywh_to_xyxy(boxes)
    return (moved / (boxes[..., 2:].tile(2) / 2)).abs()


@pytest.fixture
def targets(make_targets):
    """Three images; the middle one has no box."""
    return make_targets(2, 0, 3, num_classes=NUM_CLASSES)


# ---- layout


@pytest.mark.parametrize(
    ("counts", "budget", "num_groups"),
    [((2, 0, 3), 10, 3), ((1,), 100, 100), ((100, 1), 100, 1), ((51,), 100, 1), ((500,), 7, 1)],
)
@KINDS
def test_as_many_groups_are_made_as_fit_into_the_budget(
    make_targets, kind, counts, budget, num_groups
):
    noised = make_denoising(kind, budget=budget)(make_targets(*counts))
    slots = min(max(counts), budget)
    assert noised.repeats == num_groups
    assert len(noised.groups) == num_groups * slots * kind.copies_per_group
    assert len(noised.groups) <= budget * kind.copies_per_group
    for part in noised.queries[:2]:
        assert part.shape[:2] == (len(counts), len(noised.groups))


def test_groups_lie_one_after_the_other_positives_before_negatives(targets):
    noised = make_denoising(budget=6, label_noise=0.0, box_noise=0.4)(targets)
    # three slots, two groups of two copies
    assert noised.groups.tolist() == [1] * 6 + [2] * 6
    reference = noised.queries.reference[2].view(4, 3, 4)  # the image that fills its slots
    shifts = corner_shifts(reference, targets[2].boxes)
    # positives move by up to 0.4 halves, negatives by 0.4 to 0.8 of them
    assert shifts[[0, 2]].max() <= 0.4 + 1e-4
    assert 0.4 - 1e-4 <= shifts[[1, 3]].min() and shifts[[1, 3]].max() <= 0.8 + 1e-4


def test_without_contrast_every_query_is_positive(targets):
    noised = make_denoising(Denoising, budget=6, box_noise=0.4)(targets)
    assert noised.groups.tolist() == [1] * 3 + [2] * 3
    reference = noised.queries.reference[2].view(2, 3, 4)
    assert corner_shifts(reference, targets[2].boxes).max() <= 0.4 + 1e-4


@KINDS
def test_without_any_box_there_is_one_group_of_empty_slots(make_targets, kind):
    noised = make_denoising(kind)(make_targets(0, 0))
    assert noised.repeats == 1
    assert noised.groups.tolist() == [1] * kind.copies_per_group
    assert all(len(part) == 0 for part in noised.match)


@KINDS
def test_empty_slots_carry_nothing_and_look_at_the_whole_image(targets, kind):
    denoising = kind(num_classes=NUM_CLASSES, embed_dim=8, budget=6)
    content, reference, _ = denoising(targets).queries
    empty = torch.ones(3, content.shape[1], dtype=torch.bool)
    empty[2] = False
    empty[0] = torch.arange(content.shape[1]) % 3 == 2  # two boxes in three slots
    assert not content[empty].any() and content[~empty].all()
    assert (reference[empty] == 0.5).all() and (reference[~empty] != 0.5).any(-1).all()


# ---- matches


@pytest.mark.parametrize("counts", [(2, 0, 3), (500, 1), (0, 4)])
@KINDS
def test_matches_point_to_the_box_that_was_noised(make_targets, kind, counts):
    targets = make_targets(*counts, num_classes=NUM_CLASSES)
    noised = make_denoising(kind, budget=9, label_noise=0.0, box_noise=0.0)(targets)
    truth = Target(*(torch.cat(parts) for parts in zip(*targets, strict=True)))
    images, queries, boxes = noised.match
    assert len(images) == noised.repeats * sum(min(count, 9) for count in counts)
    torch.testing.assert_close(noised.queries.reference[images, queries], truth.boxes[boxes])
    assert torch.equal(labels_of(noised)[images, queries], truth.labels[boxes])
    starts = [sum(counts[:image]) for image in images]
    assert all(0 <= box - start for box, start in zip(boxes, starts, strict=True))


def test_every_box_is_matched_once_per_group(targets):
    noised = make_denoising(budget=12)(targets)
    groups = noised.groups[noised.match.queries]
    pairs = set(zip(groups.tolist(), noised.match.targets.tolist(), strict=True))
    assert len(pairs) == len(groups) == noised.repeats * 5
    assert pairs == {(group, box) for group in range(1, 5) for box in range(5)}


def test_a_crowded_image_takes_part_with_a_subset_drawn_anew(make_targets):
    targets, denoising = make_targets(500), make_denoising(budget=20)
    first, second = (set(denoising(targets).match.targets.tolist()) for _ in range(2))
    assert len(first) == len(second) == 20
    assert first != second and max(first | second) > 100


# ---- noise


@pytest.mark.parametrize("harder", [False, True])
@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_corners_move_by_their_reach_at_most_and_negatives_by_as_much_at_least(scale, harder):
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.3]).expand(5000, 4)
    shifts = corner_shifts(noise_boxes(boxes, scale, torch.tensor(harder)), boxes) / scale
    low, high = (1, 2) if harder else (0, 1)  # half the size; from half to the full size
    assert low - 1e-4 <= shifts.min() and shifts.max() <= high + 1e-4
    # uniform within: mean (low + high) / 2, deviation 1 / sqrt(12), 20000 of them
    assert shifts.mean().item() == pytest.approx((low + high) / 2, abs=0.01)
    assert shifts.std().item() == pytest.approx(12**-0.5, abs=0.01)


def test_every_coordinate_moves_by_itself_in_either_direction():
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(5000, 4)
    moved = cxcywh_to_xyxy(noise_boxes(boxes, 1.0, torch.tensor(False))) - cxcywh_to_xyxy(boxes)
    assert (moved > 0).float().mean(0).sub(0.5).abs().max() < 0.05
    correlation = torch.corrcoef(moved.T) - torch.eye(4)
    assert correlation.abs().max() < 0.08


@KINDS
def test_noised_boxes_stay_inside_the_image(kind):
    corners = torch.rand(50, 2, 2).sort(1).values.flatten(1)
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    target = Target(torch.zeros(50, dtype=torch.int64), boxes)
    reference = make_denoising(kind, budget=1000)([target]).queries.reference
    assert (reference > 0).all() and (reference < 1).all()
    corners = cxcywh_to_xyxy(reference)
    assert -1e-5 <= corners.min() and corners.max() <= 1 + 1e-5


def test_half_the_label_noise_draws_a_label_anew(make_targets):
    targets = make_targets(10, num_classes=NUM_CLASSES)
    labels = labels_of(make_denoising(Denoising, budget=20000, label_noise=0.8)(targets))
    flipped = (labels[0].view(2000, 10) != targets[0].labels).float().mean().item()
    # 0.8 / 2, but a quarter of the draws is right: 0.3, deviation sqrt(0.3 * 0.7 / 20000) = 0.003
    assert flipped == pytest.approx(0.3, abs=0.015)
    assert labels.max() < NUM_CLASSES


def test_labels_of_positives_and_negatives_are_flipped_alike(make_targets):
    targets = make_targets(10, num_classes=NUM_CLASSES)
    noised = make_denoising(budget=10000, label_noise=1.0)(targets)
    flipped = labels_of(noised).view(1000, 2, 10) != targets[0].labels
    rates = flipped.float().mean((0, 2))  # 3/8 each
    torch.testing.assert_close(rates, torch.tensor([0.375, 0.375]), atol=0.025, rtol=0)


def test_the_same_seed_gives_the_same_noise(make_targets):
    targets, denoising = make_targets(30, 2), make_denoising(budget=20)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        noised = denoising(targets)
        runs.append((*noised.queries[:2], noised.match.targets))
    for first, again, other in zip(*runs, strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_targets_are_left_as_they_were(targets):
    before = [Target(*(x.clone() for x in target)) for target in targets]
    make_denoising()(targets)
    for a, b in zip(targets, before, strict=True):
        assert torch.equal(a.labels, b.labels) and torch.equal(a.boxes, b.boxes)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="budget of denoising is 0"):
        make_denoising(budget=0)


# ---- mask


@pytest.mark.parametrize("groups", [[1, 1, 2, 2, 3, 3, 0, 0, 0], [1, 0], [0, 0], [1, 2, -3, -4, 0]])
def test_the_mask_keeps_groups_from_each_other_and_hides_them_from_the_result(groups):
    mask = group_attn_mask(torch.tensor(groups))
    assert mask.shape == (len(groups),) * 2 and mask.dtype == torch.bool
    for query, own in enumerate(groups):
        for key, other in enumerate(groups):
            sees = other == own or own > 0 and other == 0
            assert mask[query, key].item() != sees


def test_groups_of_several_branches_are_different_ones():
    joined = join_groups([torch.tensor([1, 1, 2]), torch.tensor([-1, -2]), torch.tensor([1])], 2)
    assert joined.tolist() == [1, 1, 2, -4, -5, 6, 0, 0]
