"""What is recorded of a forward pass is what happened in it."""

import pytest
import torch
from outputs import detector_output, run_detector
from torch.nn import functional as F

from dino_d2 import modeling
from dino_d2.modeling.positions import LearnedPosition
from dino_d2.modeling.query_selection import PointQueries, ProposalQueries
from dino_d2.ops.reference import forward
from dino_d2.trace import denoised_boxes, match_stages, trace

PADDED = [(64, 64), (40, 56)]  # sizes of two images of a batch
SELECTIONS = pytest.mark.parametrize(
    "selection", [modeling.MixedQuerySelection, modeling.PureQuerySelection]
)


@pytest.fixture
def make_traced(make_dino, make_batch, randomise):
    """A model, its trace and the inputs of it; `hooks` are of modules of the model."""

    def make(counts=(3, 2), targets=False, sizes=PADDED, random=True, **options):
        model = make_dino(**options).eval()
        if random:
            randomise(model, std=0.1)
        batch = make_batch(*counts, sizes=sizes[: len(counts)])
        images = model.preprocess_images(batch)
        targets = model.prepare_targets(batch) if targets else None
        torch.manual_seed(1)
        return model, trace(model, images, targets), (images, targets)

    return make


def record(module, calls):
    return module.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )


def num_hooks(model):
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules())


@pytest.mark.parametrize("targets", [False, True])
def test_predictions_are_those_of_a_pass_that_nobody_watches(make_traced, targets):
    model, traced, inputs = make_traced(targets=targets)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = run_detector(model, *inputs)
    for found, branch in zip(traced.output.branches, expected.branches, strict=True):
        for field in ("layers", "proposals"):
            pair = getattr(found, field), getattr(branch, field)
            torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_nobody_watches_afterwards(make_traced):
    model, _, _ = make_traced()
    assert num_hooks(model) == 0


def test_an_encoder_layer_of_another_kind_is_not_asked_for_its_attention(make_dino, make_batch):
    class Plain(torch.nn.Module):
        def forward(self, pyramid, centers):
            return pyramid

    model = make_dino().eval()
    model.encoder.layers[-1] = Plain()
    traced = trace(model, model.preprocess_images(make_batch(1)))
    assert traced.encoder_attention is None and traced.layers[0].locations is not None


def test_nobody_watches_after_a_pass_that_failed(make_dino, make_batch, monkeypatch):
    model, watching = make_dino().eval(), []

    def fail(*_):
        watching.append(num_hooks(model))
        raise RuntimeError

    monkeypatch.setattr(model, "detect", fail)
    with pytest.raises(RuntimeError):
        trace(model, model.preprocess_images(make_batch(1)))
    assert watching == [7]  # query selection, and two layers with two kinds of attention each
    assert num_hooks(model) == 0


def test_recorded_points_and_weights_make_the_output_of_the_layer(make_traced):
    model, traced, inputs = make_traced()
    for layer, recorded in zip(model.decoder.layers, traced.layers, strict=True):
        calls, module = [], layer.cross_attn
        with torch.no_grad(), record(module, calls):
            run_detector(model, *inputs)
        ((_, _, memory), _, output) = calls[0]
        value = module.value_proj(memory.tokens).masked_fill(memory.padding[..., None], 0)
        shapes = [side for shape in memory.shapes for side in shape]
        locations = recorded.locations * memory.valid_ratios[:, None, None, :, None]
        expected = forward(value.unflatten(-1, (4, -1)), shapes, locations, recorded.weights)
        torch.testing.assert_close(module.output_proj(expected), output, rtol=1e-4, atol=1e-4)
        assert traced.shapes == memory.shapes


def test_weights_of_a_head_sum_to_one(make_traced):
    for layer in make_traced()[1].layers:
        sums = layer.weights.sum((-2, -1))
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_recorded_self_attention_makes_the_output_of_a_layer_of_one_head(make_traced):
    model, traced, inputs = make_traced(num_heads=1)
    for layer, recorded in zip(model.decoder.layers, traced.layers, strict=True):
        calls, module = [], layer.self_attn
        with torch.no_grad(), record(module, calls):
            run_detector(model, *inputs)
        ((content, *_), _, output) = calls[0]
        weight, bias = module.in_proj_weight.chunk(3)[2], module.in_proj_bias.chunk(3)[2]
        expected = module.out_proj(recorded.self_attention @ F.linear(content, weight, bias))
        torch.testing.assert_close(expected, output, rtol=1e-4, atol=1e-4)


def test_denoising_queries_are_left_out(make_traced):
    traces = []
    for targets in (False, True):
        torch.manual_seed(0)
        traces.append(make_traced(targets=targets)[1])
    alone, among = traces
    assert among.output.named("dn") is not None
    # The others do not see them.
    torch.testing.assert_close(among.layers, alone.layers, rtol=1e-4, atol=1e-5)


@SELECTIONS
def test_layers_start_from_the_proposals_and_go_on_from_the_layer_before(make_traced, selection):
    _, traced, _ = make_traced(query_selection=selection, final_norm=False)
    stages = [traced.output.result.proposals, *traced.output.result.layers]
    for stage, layer in zip(stages, traced.layers, strict=False):  # without norm, what is predicted
        torch.testing.assert_close(layer.reference, stage.boxes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "selection", [modeling.MixedQuerySelection, modeling.PureQuerySelection, ProposalQueries]
)
def test_selected_tokens_are_those_that_the_proposals_are_of(make_traced, selection):
    options = {}
    if selection is ProposalQueries:
        options = {"denoising": None, "position_head": LearnedPosition()}
    _, traced, _ = make_traced(
        query_selection=selection, random=False, sizes=[(64, 64)] * 2, **options
    )
    chosen = traced.selection
    assert chosen.boxes.shape == (2, 20, 4)
    # The box head starts at zero, so a proposal is the anchor of its token.
    torch.testing.assert_close(chosen.boxes[..., :2], chosen.centers)
    sides = 0.05 * 2.0**chosen.levels
    torch.testing.assert_close(chosen.boxes[..., 2], sides, rtol=1e-4, atol=1e-5)


def test_every_token_is_of_its_level(make_traced):
    # As many queries as tokens: all are selected.
    _, traced, _ = make_traced(num_queries=100, sizes=[(64, 64)] * 2)
    for level, (height, width) in enumerate(traced.shapes):
        centers = traced.selection.centers[0, traced.selection.levels[0] == level]
        cells = centers * torch.tensor([width, height]) - 0.5
        expected = {(float(x), float(y)) for x in range(width) for y in range(height)}
        assert sorted(map(tuple, cells.tolist())) == sorted(expected)


def test_scores_of_selection_are_those_of_the_proposals(make_traced):
    _, traced, _ = make_traced()
    expected = traced.output.result.proposals.logits.amax(-1).sigmoid()
    torch.testing.assert_close(traced.selection.scores, expected)
    assert torch.equal(traced.selection.boxes, traced.output.result.proposals.boxes)


def test_objectness_of_two_stages_is_that_of_the_first_class(make_traced):
    _, traced, _ = make_traced(
        query_selection=ProposalQueries, denoising=None, position_head=LearnedPosition()
    )
    expected = traced.output.result.proposals.logits[..., 0].sigmoid().topk(20).values
    torch.testing.assert_close(traced.selection.scores, expected)


def test_learned_queries_are_not_selected(make_traced):
    model, traced, _ = make_traced(query_selection=modeling.StaticQueries)
    assert traced.selection is None
    anchors = model.query_selection.anchors.weight.sigmoid()
    torch.testing.assert_close(traced.layers[0].reference[0], anchors)


class Points(PointQueries):
    def __init__(self, num_classes, **sizes):
        super().__init__(**sizes)


def test_points_are_recorded_as_points(make_traced):
    _, traced, _ = make_traced(
        query_selection=Points, denoising=None, position_head=LearnedPosition(), look_forward=0
    )
    assert [layer.reference.shape for layer in traced.layers] == [(2, 20, 2)] * 2
    torch.testing.assert_close(traced.layers[0].reference, traced.layers[1].reference)


def test_records_are_in_float32_whatever_autocast_does(make_dino, make_batch):
    model = make_dino().eval()
    images = model.preprocess_images(make_batch(1))
    with torch.autocast("cpu", torch.bfloat16):
        traced = trace(model, images)
    for layer in traced.layers:
        assert {x.dtype for x in layer if x is not None} == {torch.float32}
    assert {x.dtype for x in traced.output.result.layers[-1]} == {torch.float32}


# ---- matching


def test_stages_are_matched_in_the_order_in_which_they_refine_each_other(make_traced):
    model, traced, (_, (target,)) = make_traced(counts=(3,), targets=True)
    matching = match_stages(model, traced.output, target)
    assert matching.stages == ["proposals", "layer 1", "layer 2"]
    stages = [traced.output.result.proposals, *traced.output.result.layers]
    for queries, stage in zip(matching.queries.tolist(), stages, strict=True):
        alone = match_stages(model, detector_output([stage], None, [], None), target)
        assert queries == alone.queries[0].tolist()


def test_proposals_of_one_class_are_not_matched_with_boxes_of_many(make_traced, make_targets):
    model, traced, _ = make_traced(
        query_selection=ProposalQueries,
        denoising=None,
        position_head=LearnedPosition(),
        counts=(1,),
    )
    matching = match_stages(model, traced.output, make_targets(2)[0])
    assert matching.stages == ["layer 1", "layer 2"]


# ---- denoising


@pytest.mark.parametrize(
    "kind, copies", [(modeling.Denoising, 1), (modeling.ContrastiveDenoising, 2)]
)
def test_denoised_boxes_are_sorted_by_group_and_copy(make_traced, kind, copies):
    _, traced, (_, (target,)) = make_traced(counts=(2,), targets=True, denoising=kind, budget=6)
    denoised = denoised_boxes(traced.output, target)
    assert denoised.scores.shape == (3, copies, 2)
    last = traced.output.named("dn").layers[-1]
    for query in range(3 * copies * 2):  # layout: group, copy, box
        place = query // (2 * copies), query // 2 % copies, query % 2
        reference = traced.output.named("dn").queries.reference[0, query]
        assert torch.equal(denoised.noised[place], reference)
        assert torch.equal(denoised.boxes[place], last.boxes[0, query])
        score = last.logits[0, query, target.labels[query % 2]].sigmoid()
        # of one and of many at once: a vectorised sigmoid may round otherwise
        torch.testing.assert_close(denoised.scores[place], score)
    assert torch.equal(denoised.truth.boxes, target.boxes)


def test_of_many_boxes_those_that_took_part_are_the_truth(make_traced):
    _, traced, (_, (target,)) = make_traced(counts=(9,), targets=True, budget=4)
    denoised = denoised_boxes(traced.output, target)
    indices = traced.output.named("dn").match.targets
    assert len(indices) == 4 and indices.tolist() != [0, 1, 2, 3]
    assert torch.equal(denoised.truth.boxes, target.boxes[indices])
    assert torch.equal(denoised.truth.labels, target.labels[indices])


def test_without_boxes_nothing_is_denoised(make_traced):
    _, traced, (_, (target,)) = make_traced(counts=(0,), targets=True)
    assert denoised_boxes(traced.output, target) is None
