from functools import partial

import pytest
import torch

from dino_d2.boxes import cxcywh_to_xyxy, iou
from dino_d2.modeling import (
    DistinctQuerySelection,
    MixedQuerySelection,
    PureQuerySelection,
    StaticQueries,
)
from dino_d2.modeling.query_selection import proposal_anchors

NUM_CLASSES = 3
SELECTIONS = [PureQuerySelection, MixedQuerySelection]
ALL = [*SELECTIONS, DistinctQuerySelection]


def make_selection(kind, num_queries=6):
    return kind(num_queries=num_queries, embed_dim=32, num_classes=NUM_CLASSES)


@pytest.fixture
def memory(make_memory):
    """36 + 9 tokens; the second image has padding on the right."""
    padding = torch.zeros(2, 48, 48, dtype=torch.bool)
    padding[1, :, 32:] = True
    return make_memory(shapes=((6, 6), (3, 3)), padding=padding)


def expect_objects_at(selection, memory, logits):
    """Makes the selection see the given logits (B, S, K), whatever the tokens are."""
    selection.class_head.forward = lambda tokens: logits
    return selection(memory)


# ---- anchors of the proposals


def test_anchors_are_centred_on_their_tokens_and_double_per_level(memory):
    anchors = proposal_anchors(memory)[0].sigmoid()
    # fine level, row 1 of 6, column 2 of 6; coarse level, row 2 of 3, column 0 of 3
    torch.testing.assert_close(anchors[8], torch.tensor([2.5 / 6, 1.5 / 6, 0.05, 0.05]))
    torch.testing.assert_close(anchors[36 + 6], torch.tensor([0.5 / 3, 2.5 / 3, 0.1, 0.1]))


def test_anchors_are_relative_to_the_image_without_padding(memory):
    anchors = proposal_anchors(memory)[1].sigmoid()
    # four of six columns are inside
    torch.testing.assert_close(anchors[8], torch.tensor([2.5 / 4, 1.5 / 6, 0.05, 0.05]))


def test_padding_has_no_anchors(memory):
    assert memory.padding.any()
    infinite = proposal_anchors(memory).isinf()
    assert torch.equal(infinite, memory.padding[..., None].expand(-1, -1, 4))


def test_the_border_has_no_anchors(make_memory):
    # columns at (i + 0.5) / 100: the first and the last are closer to the border than 0.01
    memory = make_memory(shapes=((1, 100),), batch=1)
    invalid = proposal_anchors(memory)[0, :, 0].isinf()
    assert invalid.nonzero().flatten().tolist() == [0, 99]


# ---- static queries


def test_static_queries_are_the_same_for_all_images(make_memory):
    queries, proposals = make_selection(StaticQueries, num_queries=5)(make_memory(batch=3))
    assert proposals is None
    assert queries.content.shape == (3, 5, 32) and queries.reference.shape == (3, 5, 4)
    for part in queries[:2]:
        assert torch.equal(part[0], part[2])
    assert 0 < queries.reference.min() and queries.reference.max() < 1


def test_static_anchors_are_learned(make_memory):
    selection = make_selection(StaticQueries)
    queries, _ = selection(make_memory())
    (queries.content.sum() + queries.reference.sum()).backward()
    assert selection.content.weight.grad.all() and selection.anchors.weight.grad.all()


# ---- selected queries


@pytest.mark.parametrize("kind", SELECTIONS)
def test_the_best_tokens_by_largest_logit_are_selected_best_first(kind, memory):
    logits = torch.randn(2, 45, NUM_CLASSES)
    queries, proposals = expect_objects_at(make_selection(kind), memory, logits)
    anchors = proposal_anchors(memory).sigmoid()
    for image in range(2):
        best = sorted(range(45), key=lambda token: -max(logits[image, token].tolist()))[:6]
        assert torch.equal(proposals.logits[image], logits[image, best])
        # a new box head leaves anchors where they are
        torch.testing.assert_close(queries.reference[image], anchors[image, best])


@pytest.mark.parametrize("kind", ALL)
def test_the_box_head_moves_the_anchor(kind, memory):
    selection = make_selection(kind)
    before, _ = selection(memory)
    torch.nn.init.constant_(selection.box_head.layers[-1].bias, 0.5)
    after, _ = selection(memory)
    moved = before.reference.logit() + 0.5
    torch.testing.assert_close(after.reference.logit(), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_proposals_are_the_queries_and_only_they_are_differentiable(kind, memory, randomise):
    queries, proposals = randomise(make_selection(kind))(memory)
    assert torch.equal(queries.reference, proposals.boxes)
    assert not queries.reference.requires_grad
    assert proposals.boxes.requires_grad and proposals.logits.requires_grad


@pytest.mark.parametrize("kind", ALL)
def test_fewer_tokens_than_queries_give_as_many_queries_as_tokens(kind, memory):
    queries, proposals = make_selection(kind, num_queries=100)(memory)
    for x in (*queries[:2], *proposals):
        assert x.shape[1] == 45 and not x.isnan().any()


def test_pure_content_is_the_selected_memory_detached(memory):
    selection = make_selection(PureQuerySelection)
    logits = torch.randn(2, 45, NUM_CLASSES)
    queries, _ = expect_objects_at(selection, memory, logits)
    tokens = selection.memory_norm(
        selection.memory_proj(memory.tokens * ~memory.padding[..., None])
    )
    for image in range(2):
        best = logits[image].amax(-1).argsort(descending=True)[:6]
        torch.testing.assert_close(queries.content[image], tokens[image, best])
    assert not queries.content.requires_grad


def test_mixed_content_is_learned_and_the_same_for_all_images(memory):
    selection = make_selection(MixedQuerySelection)
    queries, _ = selection(memory)
    for content in queries.content:
        assert torch.equal(content, selection.content.weight)
    queries.content.sum().backward()
    assert torch.equal(selection.content.weight.grad, torch.full((6, 32), 2.0))  # two images


@pytest.mark.parametrize("kind", ALL)
def test_what_is_on_the_padding_does_not_matter(kind, memory, randomise):
    selection = randomise(make_selection(kind))
    noise = 100 * torch.randn_like(memory.tokens) * memory.padding[..., None]
    noisy = memory._replace(tokens=memory.tokens + noise)
    for a, b in zip(selection(memory), selection(noisy), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:2], b[:2], strict=True))


# ---- distinct queries


def selected(selection, memory, logits):
    """The tokens that become queries, of the given logits."""
    tokens, anchors, _ = selection.candidates(memory)
    return selection.choose(tokens, anchors, logits, selection.box_head)


def test_the_best_distinct_tokens_come_first_and_the_best_of_the_others_follow(make_memory):
    memory = make_memory()
    make = partial(DistinctQuerySelection, iou_threshold=0.3)
    selection = make_selection(make, num_queries=30)  # of 30 + 9 tokens
    torch.nn.init.constant_(selection.box_head.layers[-1].bias[2:], 3.0)
    logits = torch.randn(2, 39, NUM_CLASSES)
    corners = cxcywh_to_xyxy((proposal_anchors(memory) + torch.tensor([0, 0, 3.0, 3.0])).sigmoid())
    found = selected(selection, memory, logits)
    for image in range(2):
        kept, others = [], []
        for token in logits[image].amax(-1).argsort(descending=True).tolist():
            near = any(iou(corners[image, token], corners[image, x]) > 0.3 for x in kept)
            (others if near else kept).append(token)
        assert 5 < len(kept) < 30
        assert found[image].tolist() == (kept + others)[:30]


def test_queries_are_chosen_among_four_times_as_many_tokens(memory):
    selection = make_selection(DistinctQuerySelection, num_queries=2)
    torch.nn.init.constant_(selection.box_head.layers[-1].bias, 20.0)  # boxes are the same
    logits = torch.randn(2, 45, NUM_CLASSES)
    logits[:, -8:] += 10
    assert (selected(selection, memory, logits) >= 37).all()


def test_distinct_content_is_a_map_of_the_token_that_does_not_train_it(memory):
    memory.tokens.requires_grad_()
    selection = make_selection(DistinctQuerySelection)
    queries, _ = selection(memory)
    tokens, anchors, logits = selection.candidates(memory)
    best = selection.choose(tokens, anchors, logits, selection.box_head)
    for image in range(2):
        expected = selection.content_proj(tokens[image, best[image]])
        torch.testing.assert_close(queries.content[image], expected)
    queries.content.sum().backward()
    assert selection.content_proj.weight.grad.any()
    assert memory.tokens.grad is None and selection.memory_proj.weight.grad is None


def test_images_of_a_batch_select_on_their_own(memory, randomise):
    selection = randomise(make_selection(DistinctQuerySelection))
    together, _ = selection(memory)
    for i in range(2):
        alone = memory._replace(
            **{k: v[i : i + 1] for k, v in memory._asdict().items() if k != "shapes"}
        )
        torch.testing.assert_close(together.reference[i], selection(alone)[0].reference[0])
