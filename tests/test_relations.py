"""What later decoder layers know of how queries relate: who is distinct, and who lies where."""

import math
from functools import partial

import pytest
import torch
from outputs import run_detector

from dino_d2.boxes import cxcywh_to_xyxy, iou
from dino_d2.layouts.dino import to_official
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.modeling import (
    DistinctQueries,
    DistinctQuerySelection,
    MixedQuerySelection,
    PositionRelation,
)
from dino_d2.modeling.branches import group_attn_mask
from dino_d2.modeling.relations import SUPPRESSED, position_relation
from dino_d2.structures import LayerOutput
from dino_d2.trace import trace

HEADS = 4
RELATIONS = pytest.mark.parametrize("relation", [DistinctQueries, PositionRelation])
# Two queries of a denoising group, two of a branch that sees itself alone, three of the result.
DISTINCT = partial(DistinctQueries, iou_threshold=0.5)  # with few queries few boxes overlap more
GROUPS = torch.tensor([1, 1, -2, -2, 0, 0, 0])


def make_output(scores, boxes):
    """A layer's, of one image, for two classes; the second is absent."""
    logits = torch.tensor([[[x, -5.0] for x in scores]])
    boxes = torch.tensor([boxes])
    return LayerOutput(logits, boxes, torch.zeros(1, len(scores), 8), boxes)


def attention_masks(decoder, run):
    """What the self-attention of each layer was given, and what the decoder returned."""
    masks, outputs = [], []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda module, args: masks.append(args[2]))
        for layer in decoder.layers
    ]
    hooks.append(decoder.register_forward_hook(lambda module, args, out: outputs.extend(out)))
    run()
    for hook in hooks:
        hook.remove()
    return masks, outputs


@pytest.fixture
def make_model(make_dino, randomise):
    """Boxes large enough to overlap, whose queries have different scores."""

    def make(relation, **options):
        selection = {"query_selection": DistinctQuerySelection}
        model = randomise(make_dino(relation=relation, **(selection | options)))
        last = model.decoder.box_heads[0].layers[-1]
        last.weight.data /= 4
        last.bias.data[2:] = 2.0
        return model

    return make


# ---- distinct queries


def test_what_is_suppressed_is_not_seen_by_others_and_predicts_nothing():
    # Boxes 0 and 1 have an IoU of 0.9, and 1 has the higher score.
    boxes = [[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.18], [0.5, 0.8, 0.2, 0.2]]
    output = make_output([0.0, 2.0, -1.0], boxes)
    left, mask = DistinctQueries(num_heads=HEADS)(output, None, last=False)
    assert left.logits[0].tolist() == [[SUPPRESSED] * 2, [2.0, -5.0], [-1.0, -5.0]]
    expected = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 0]]).bool()
    assert torch.equal(mask, expected.expand(HEADS, 3, 3))
    _, mask = DistinctQueries(num_heads=HEADS, iou_threshold=0.91)(output, None, last=False)
    assert not mask.any()


def test_other_branches_suppress_nobody_and_see_whom_they_saw():
    boxes = [[0.5, 0.5, 0.2, 0.2]] * 6 + [[0.2, 0.2, 0.1, 0.1]]
    output = make_output([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 0.0], boxes)
    attn_mask = group_attn_mask(GROUPS)
    left, mask = DistinctQueries(num_heads=HEADS)(output, attn_mask, last=False)
    changed = (left.logits != output.logits).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [4]  # the lower score of the result's two
    more = (mask ^ attn_mask).nonzero()
    assert more.tolist() == [[head, query, 4] for head in range(HEADS) for query in (5, 6)]


def test_the_mask_of_a_layer_is_of_the_predictions_of_the_layer_before(make_model, make_batch):
    model = make_model(DISTINCT, num_layers=3).eval()
    images = model.preprocess_images(make_batch(1, 1))
    masks, outputs = attention_masks(model.decoder, lambda: run_detector(model, images))
    assert masks[0] is None
    suppressed = 0
    for mask, before in zip(masks[1:], outputs[:-1], strict=True):
        scores = model.decoder.class_heads[0](before.features).amax(-1)
        corners = cxcywh_to_xyxy(before.boxes)
        expected = torch.zeros(2, 20, 20, dtype=torch.bool)
        for image in range(2):
            kept = []
            for query in scores[image].argsort(descending=True).tolist():
                if all(iou(corners[image, query], corners[image, x]) <= 0.5 for x in kept):
                    kept.append(query)
                else:
                    expected[image, :, query] = True
                    expected[image, query, query] = False
                    suppressed += 1
        assert torch.equal(mask.view(2, HEADS, 20, 20), expected[:, None].expand(-1, HEADS, -1, -1))
    assert 5 < suppressed < 70  # of 80


def test_detections_are_distinct(make_model, make_batch):
    model = make_model(DISTINCT).eval()
    last = run_detector(model, model.preprocess_images(make_batch(1))).result.layers[-1]
    boxes = cxcywh_to_xyxy(last.boxes[last.logits.amax(-1).sigmoid() > 1e-6])
    assert 3 < len(boxes) < 18
    assert (iou(boxes[:, None], boxes).fill_diagonal_(0) <= 0.5).all()


def test_what_is_suppressed_is_neither_background_nor_matched(make_model, make_batch):
    model = make_model(DISTINCT, denoising=None).train()
    batch, outputs, matches = make_batch(2), [], []
    model.decoder.register_forward_hook(lambda module, args, out: outputs.extend(out))
    matcher = model.criterion.matcher
    model.criterion.matcher = lambda *args: matches.append(matcher(*args)) or matches[-1]
    losses = model(batch)
    (match,) = matches
    for layer, x in enumerate(outputs):
        suppressed = (x.logits[0] == SUPPRESSED).all(-1)
        assert 0 < suppressed.sum() < 18 and not suppressed[match.queries[layer]].any()
        # p^2 * softplus(x) is 0 for x = -100, so adding such queries adds no loss
        torch.testing.assert_close(
            model.criterion.class_loss.background_loss(x.logits[0, suppressed]),
            torch.zeros(int(suppressed.sum()), 3),
        )
    assert all(torch.isfinite(x) for x in losses.values())


# ---- the position relation


def test_a_relation_is_of_distances_and_sizes():
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.9, 0.1, 0.1]]])
    others = torch.tensor([[[0.3, 0.5, 0.1, 0.8], [0.1, 0.9, 0.1, 0.1]]])
    expected = torch.tensor(
        [
            # 0.2 / 0.2 + 1, 0 / 0.4 + 1, 0.2 / 0.1, 0.4 / 0.8; 0.4 / 0.2 + 1, 0.4 / 0.4 + 1, ...
            [[2, 1, 2, 0.5], [3, 2, 2, 4]],
            [[3, 5, 1, 0.125], [1, 1, 1, 1]],
        ]
    ).log()
    torch.testing.assert_close(position_relation(boxes, others)[0], expected, rtol=0, atol=5e-4)


def test_the_bias_is_a_map_of_sines_and_cosines_and_forbids_what_is_forbidden(randomise):
    relation = randomise(PositionRelation(num_heads=HEADS))
    boxes = 0.2 + 0.6 * torch.rand(2, 2, 7, 4)
    output = LayerOutput(torch.zeros(2, 7, 3), boxes[0], torch.zeros(2, 7, 8), boxes[1])
    attn_mask = group_attn_mask(GROUPS)
    same, bias = relation(output, attn_mask, last=False)
    assert same is output
    numbers = position_relation(boxes[1], boxes[0])
    for image, query, other in ((0, 4, 6), (1, 2, 3), (1, 0, 5)):
        encoding = []
        for x in numbers[image, query, other].tolist():
            for i in range(8):
                phase = 100 * x / 10000 ** (i / 8)
                encoding += [math.sin(phase), math.cos(phase)]
        expected = (relation.proj.weight @ torch.tensor(encoding) + relation.proj.bias).relu()
        found = bias.view(2, HEADS, 7, 7)[image, :, query, other]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(bias.isinf(), attn_mask.expand(2 * HEADS, 7, 7))


def test_the_second_layer_relates_where_queries_started_to_where_they_went(make_model, make_batch):
    model = make_model(PositionRelation, num_layers=3).eval()
    images = model.preprocess_images(make_batch(1, 1))
    with torch.no_grad():
        masks, outputs = attention_masks(model.decoder, lambda: run_detector(model, images))
        assert masks[0] is None
        for mask, before in zip(masks[1:], outputs[:-1], strict=True):
            expected = model.decoder.relation(before, None, last=False)[1]
            assert torch.equal(mask, expected) and mask.any()


def test_a_relation_of_points_is_refused():
    boxes = torch.rand(1, 2, 4)
    output = LayerOutput(torch.zeros(1, 2, 3), boxes, torch.zeros(1, 2, 8), boxes[..., :2])
    with pytest.raises(ValueError, match="PositionRelation needs queries with boxes"):
        PositionRelation(num_heads=HEADS)(output, None, last=False)


# ---- both, in the detector


@RELATIONS
@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_learns(make_model, make_batch, relation, recompute):
    model = make_model(relation).train()
    model.decoder.recompute = recompute
    for counts in ((2, 3), (0, 0)):
        model.zero_grad()
        losses = model(make_batch(*counts))
        sum(losses.values()).backward()
        assert all(torch.isfinite(x) for x in losses.values())
        assert all(x.grad is not None for x in model.parameters() if x.requires_grad)


@RELATIONS
def test_it_trains_and_detects_in_bfloat16(make_model, make_batch, relation):
    model = make_model(relation).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(make_batch(2, 1))
        sum(losses.values()).backward()
        found = model.eval()(make_batch(1))[0]["instances"]
    assert all(torch.isfinite(x) for x in losses.values()) and torch.isfinite(found.scores).all()
    assert model.query_selection.content_proj.weight.grad.any()


@RELATIONS
def test_the_result_does_not_know_of_denoising_nor_of_other_images(
    make_model, make_batch, relation
):
    model = make_model(relation).eval()
    batch = make_batch(2, 3)
    images, targets = model.preprocess_images(batch), model.prepare_targets(batch)
    with torch.no_grad():
        together = run_detector(model, images, targets)
        one_by_one = [run_detector(model, model.preprocess_images([x])) for x in batch]
    assert [x.name for x in together.branches] == ["", "dn"]
    for layer, stage in enumerate(together.result.layers):
        parts = zip(*(x.result.layers[layer] for x in one_by_one), strict=True)
        for found, expected in zip(stage, parts, strict=True):
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


@RELATIONS
def test_a_trace_has_the_attention_that_there_was(make_model, make_batch, relation):
    model = make_model(relation, num_layers=3).eval()
    batch = make_batch(2)
    images, targets = model.preprocess_images(batch), model.prepare_targets(batch)
    masks, _ = attention_masks(model.decoder, lambda: run_detector(model, images))
    traced = trace(model, images, targets)
    torch.testing.assert_close(
        traced.selection.scores[0].logit(), traced.output.result.proposals.logits[0].amax(-1)
    )
    for mask, layer in zip(masks[1:], traced.layers[1:], strict=True):
        attention = layer.self_attention[0]
        torch.testing.assert_close(attention.sum(1), torch.ones(20))
        unseen = mask.view(HEADS, 20, 20)[0] if mask.dtype == torch.bool else torch.zeros(1)
        assert not attention[unseen.bool().expand(20, 20)].any()


def test_a_relation_of_one_layer_would_not_learn(make_dino):
    with pytest.raises(ValueError, match="PositionRelation passes relations .* has 1 layer"):
        make_dino(relation=PositionRelation, num_layers=1)


@pytest.mark.parametrize("part", ["decoder.relation", "query_selection.content_proj"])
def test_official_dino_has_no_place_for_relations(make_dino, part):
    options = {"relation": PositionRelation} if "relation" in part else {}
    selection = DistinctQuerySelection if "content" in part else MixedQuerySelection
    with pytest.raises(CheckpointError, match=f"official DINO has no {part}, "):
        to_official(make_dino(selection, **options).state_dict())
