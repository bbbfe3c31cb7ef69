"""DINO's predecessors: their configs, and the parts that DINO itself does without."""

from functools import partial
from math import cos, exp, log, pi, sin

import pytest
import torch
from conftest import TinyBackbone
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.utils.registry import locate
from omegaconf import OmegaConf
from outputs import detector_output, run_detector, with_result
from torch.nn import functional as F

from dino_d2.boxes import cxcywh_to_xyxy, generalized_iou, refine
from dino_d2.export import About, Exportable, Exported, compare, export, save
from dino_d2.layers import ConditionalCrossAttention, ConditionalSelfAttention, DenseAttention
from dino_d2.layouts.adapt import select_classes
from dino_d2.modeling import (
    Denoising,
    HungarianMatcher,
    OneToManyHead,
    PositionSupervisedLoss,
    SetCriterion,
    SoftmaxLoss,
    SoftmaxMatcher,
    StaticQueries,
)
from dino_d2.modeling.backbones import dc5_stages
from dino_d2.modeling.criterion import AllProposals, BoxesOnly
from dino_d2.modeling.denoising import IndicatorDenoising
from dino_d2.modeling.positions import (
    ConditionalPosition,
    LearnedPosition,
    ScaledAnchorPosition,
)
from dino_d2.modeling.postprocess import choose_classes, detections_of
from dino_d2.modeling.query_selection import (
    IndicatorPatternQueries,
    IndicatorQueries,
    ObjectQueries,
    PatternQueries,
    PointQueries,
    ProposalQueries,
    PureQuerySelection,
    proposal_anchors,
)
from dino_d2.structures import Detections, FeaturePyramid, Predictions, Queries, Target
from dino_d2.weights import model_zoo

PLAIN = "deformable_detr_R_50_50ep"
REFINE = "deformable_detr_R_50_refine_50ep"
TWO_STAGE = "deformable_detr_R_50_two_stage_50ep"
DAB = "dab_deformable_detr_R_50_50ep"
DAB_TWO_STAGE = "dab_deformable_detr_R_50_two_stage_50ep"
DN = "dn_deformable_detr_R_50_50ep"
DETR = "detr_R_50_500ep"
DAB_DETR = "dab_detr_R_50_50ep"
DN_DETR = "dn_detr_R_50_50ep"
# These have the parts of the others.
CONFIGS = pytest.mark.parametrize(
    "name",
    [
        *(DETR, DN, DAB_TWO_STAGE),
        *(pytest.param(x, marks=pytest.mark.slow) for x in (PLAIN, TWO_STAGE, DN_DETR)),
    ],
)
NUM_CLASSES = 3
SMALL = [
    f"num_classes={NUM_CLASSES}",
    *("encoder.num_layers=1", "encoder.embed_dim=64", "encoder.num_heads=4", "encoder.ffn_dim=16"),
    *("decoder.num_layers=3", "query_selection.num_queries=10"),
]


def load(name, *overrides):
    folder = "" if name.startswith("dino") else "Predecessors/"
    cfg = model_zoo.get_config(f"{folder}{name}.py").model
    return LazyConfig.apply_overrides(cfg, list(overrides))


def small(name, *overrides):
    """A config of 64 channels, 1 + 3 layers, 10 queries, and no backbone to speak of."""
    cfg = load(name, *SMALL, *overrides)
    features = cfg.backbone.out_features
    cfg.backbone = LazyCall(TinyBackbone)(features=features)
    cfg.neck.update(in_features=features, input_shape=instantiate(cfg.backbone).output_shape())
    return cfg


def make_small(name):
    return instantiate(small(name))


@pytest.fixture
def decoded(make_batch, randomise):
    """What the layers of a small model's decoder are given, and the predictions."""

    def run(name):
        model, calls = make_small(name), []
        randomise(model.decoder)
        randomise(model.query_selection)
        for layer in model.decoder.layers:
            layer.register_forward_pre_hook(lambda _, args: calls.append(args))
        output = run_detector(model, model.preprocess_images(make_batch(1, 1)))
        return model, calls, output

    return run


def sines(values, channels):
    """Each value as sines and cosines of falling frequency, value after value."""
    return torch.tensor(
        [
            f(2 * pi * value / 10000 ** (2 * i / channels))
            for value in values
            for i in range(channels // 2)
            for f in (sin, cos)
        ]
    )


# ---- configs


@pytest.mark.parametrize(
    ("name", "count"),
    [
        (DETR, 41_302_368),  # as recorded of the official ones; published: 41 M
        (DETR.replace("50_500", "101_500"), 60_242_272),  # 60 M
        (DAB_DETR, 43_449_117),  # 44 M
        (DN_DETR, 43_472_577 + 255),  # 44 M; content of matching queries has a row of its own
        (PLAIN, 39_847_265),  # 40 M
        (REFINE, 40_627_260),  # 41 M
        (TWO_STAGE, 40_959_129),  # 41 M
        (DAB, 47_183_594),  # 47 M
        (DN, 47_206_754),  # 47 M
        ("dino_R_50_4scale_12ep", 46_670_782),  # 47 M
    ],
)
def test_models_have_as_many_parameters_as_published(name, count):
    with torch.device("meta"):
        model = instantiate(load(name, "num_classes=91"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(
    ("name", "selection", "position", "denoising", "criterion", "look_forward", "size_biases"),
    [
        (DAB_DETR, PatternQueries, ConditionalPosition, None, SetCriterion, 2, [0]),
        (
            DN_DETR,
            IndicatorPatternQueries,
            ConditionalPosition,
            IndicatorDenoising,
            BoxesOnly,
            2,
            [0],
        ),
        (PLAIN, PointQueries, LearnedPosition, None, SetCriterion, 0, [-2]),
        (REFINE, PointQueries, LearnedPosition, None, SetCriterion, 1, [-2, 0, 0]),
        (TWO_STAGE, ProposalQueries, LearnedPosition, None, AllProposals, 1, [0, 0, 0]),
        (DAB, StaticQueries, ScaledAnchorPosition, None, SetCriterion, 1, [-2, 0, 0]),
        (DAB_TWO_STAGE, PureQuerySelection, ScaledAnchorPosition, None, SetCriterion, 1, [0, 0, 0]),
        (DN, IndicatorQueries, ScaledAnchorPosition, IndicatorDenoising, BoxesOnly, 1, [-2, 0, 0]),
    ],
)
def test_models_are_composed_as_published(
    name, selection, position, denoising, criterion, look_forward, size_biases
):
    model = make_small(name)
    decoder = model.decoder
    assert type(model.query_selection) is selection and type(model.criterion) is criterion
    assert type(decoder.position_head) is position and decoder.look_forward == look_forward
    assert type(model.denoising) is (denoising or type(None))
    biases = [head.layers[-1].bias.tolist() for head in decoder.box_heads]
    assert biases == [[0, 0, bias, bias] for bias in size_biases]
    assert len(decoder.class_heads) == len(size_biases)  # one for all layers, or one for each
    assert model.max_detections == (300 if name in (DAB_DETR, DN_DETR, DAB_TWO_STAGE) else 100)


@pytest.mark.parametrize(
    ("name", "batch", "lr", "offsets_lr", "class_weight", "dropout"),
    [
        (PLAIN, 32, 2e-4, 2e-5, 2.0, 0.1),
        (REFINE, 32, 2e-4, 2e-5, 2.0, 0.1),
        (TWO_STAGE, 32, 2e-4, 2e-5, 2.0, 0.1),
        (DAB, 16, 1e-4, 1e-4, 1.0, 0.0),
        (DAB_TWO_STAGE, 16, 1e-4, 1e-4, 1.0, 0.0),
        (DN, 16, 1e-4, 1e-4, 1.0, 0.0),
    ],
)
def test_models_are_trained_as_published(name, batch, lr, offsets_lr, class_weight, dropout):
    cfg = model_zoo.get_config(f"Predecessors/{name}.py")
    params = cfg.optimizer.params
    assert cfg.dataloader.train.total_batch_size == batch
    assert params.lr == lr and lr * params.offsets_multiplier == pytest.approx(offsets_lr)
    assert params.backbone_multiplier == 0.1
    assert cfg.model.criterion.class_weight == class_weight
    assert cfg.model.encoder.dropout == cfg.model.decoder.dropout == dropout
    assert cfg.model.encoder.position_temperature == 10000
    assert cfg.model.encoder.position_offset == -0.5
    # 50 epochs of COCO, slower after 40
    assert cfg.train.max_iter * batch / 118_287 == pytest.approx(50, rel=1e-3)
    multiplier = instantiate(cfg.lr_multiplier)
    assert [multiplier(epoch / 50) for epoch in (0, 39.9, 40.1)] == pytest.approx([1, 1, 0.1])


@pytest.mark.slow
@CONFIGS
def test_every_parameter_is_trained_whether_there_are_boxes_or_not(make_batch, name):
    model = make_small(name)
    for counts in [(2, 1), (2, 0), (0, 0)]:
        model.zero_grad()
        loss = sum(model(make_batch(*counts)).values())
        loss.backward()
        assert loss.isfinite()
        grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
        assert [key for key, grad in grads.items() if grad is None] == []
        assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.slow
@CONFIGS
def test_a_training_step_under_autocast_is_finite(make_batch, name, device):
    model = make_small(name).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = sum(model(make_batch(2, 0)).values())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@CONFIGS
def test_every_model_detects(make_batch, name):
    model = make_small(name).eval()
    with torch.no_grad():
        results = model(make_batch(1, 0, sizes=[(64, 64), (48, 80)]))
    for result, size in zip(results, [(64, 64), (48, 80)], strict=True):
        instances = result["instances"]
        # ten queries of three classes, of which each of DETR's has one
        assert len(instances) == 10 * (1 if name == DETR else NUM_CLASSES)
        assert instances.image_size == size
        assert instances.scores.isfinite().all() and instances.pred_boxes.tensor.isfinite().all()


@CONFIGS
def test_losses_of_every_stage_are_there(make_batch, name):
    losses = make_small(name)(make_batch(2, 1))
    suffixes = ["", "_0", "_1"]
    suffixes += ["_enc"] * (name in (TWO_STAGE, DAB_TWO_STAGE))
    suffixes += ["_dn", "_dn_0", "_dn_1"] * (name in (DN, DN_DETR))
    kinds = ("loss_class", "loss_bbox", "loss_giou")
    assert set(losses) == {kind + suffix for kind in kinds for suffix in suffixes}


def test_models_built_of_points_refuse_denoising(make_batch):
    cfg = small(PLAIN)
    cfg.denoising = LazyCall(Denoising)(num_classes=NUM_CLASSES, embed_dim=64)
    with pytest.raises(ValueError, match="those of this model are points"):
        instantiate(cfg)(make_batch(2, 1))


# ---- DETR


def test_queries_of_detr_are_learned_positions_and_nothing_else(make_memory):
    selection = ObjectQueries(num_queries=5, embed_dim=32)
    queries, proposals = selection(make_memory(batch=3))
    assert proposals is None and not queries.content.any()
    assert queries.reference.shape == (3, 5, 0)
    assert torch.equal(queries.position, selection.position.weight.expand(3, -1, -1))


@pytest.mark.parametrize("kind", ["dense", "conditional"])
def test_padding_is_not_attended_to(make_memory, randomise, kind):
    padding = torch.zeros(2, 48, 48, dtype=torch.bool)
    padding[1, :, 32:] = True
    memory = make_memory(shapes=((6, 6),), padding=padding)
    x = torch.randn(2, 4, 32)
    if kind == "dense":
        attention = randomise(DenseAttention(embed_dim=32, num_heads=4))
        attend = partial(attention, x)
    else:
        attention = randomise(ConditionalCrossAttention(embed_dim=32, num_heads=4, first=True))
        attend = partial(attention, x, torch.randn(2, 4, 32), torch.randn(2, 4, 32))
    noise = 100 * torch.randn_like(memory.tokens) * memory.padding[..., None]
    others = memory._replace(tokens=memory.tokens + noise, position=memory.position + noise)
    assert memory.padding.any()
    torch.testing.assert_close(attend(others), attend(memory))


def test_a_class_costs_its_probability_and_no_object_a_tenth():
    """Three queries, one box: cross-entropy of all, divided by the weights 1, 0.1 and 0.1."""
    logits = torch.tensor([[[2.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 3]]])
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).repeat(1, 3, 1)
    target = Target(torch.tensor([1]), boxes[0, :1])
    p = logits[0].softmax(-1)
    predictions = Predictions(logits[None], boxes[None])
    matcher = SoftmaxMatcher(class_cost=1.0, bbox_cost=0.0, giou_cost=0.0)
    torch.testing.assert_close(matcher.costs(predictions, [target])[0, :, 0], -p[:, 1])
    assert matcher(predictions, [target]).queries.tolist() == [[1]]
    criterion = SetCriterion(matcher=matcher, class_loss=SoftmaxLoss(), class_weight=1.0)
    losses = criterion(detector_output([Predictions(logits, boxes)]), [target])
    expected = -(0.1 * p[0, 3].log() + p[1, 1].log() + 0.1 * p[2, 3].log()) / 1.2
    torch.testing.assert_close(losses["loss_class"], expected)
    weight = torch.tensor([1.0, 1, 1, 0.1])
    same = F.cross_entropy(logits[0], torch.tensor([3, 1, 3]), weight)
    torch.testing.assert_close(losses["loss_class"], same)


def test_the_mean_of_softmax_losses_does_not_depend_on_the_number_of_boxes():
    logits, boxes = torch.zeros(2, 5, 4), torch.rand(2, 5, 4)
    criterion = SetCriterion(matcher=SoftmaxMatcher(), class_loss=SoftmaxLoss())
    for counts in [(0, 0), (1, 0), (3, 2)]:
        targets = [Target(torch.zeros(n, dtype=torch.int64), torch.rand(n, 4)) for n in counts]
        losses = criterion(detector_output([Predictions(logits, boxes)]), targets)
        assert losses["loss_class"].item() == pytest.approx(log(4))


def test_a_query_of_detr_has_its_best_class_and_the_best_come_first():
    logits = torch.tensor([[[1.0, 3, 0, 2], [0, 0, 1, 5], [4, 0, 0, 0]]])
    boxes = torch.rand(1, 3, 4)
    found = detections_of(
        Predictions(logits, boxes), choose_classes(logits.softmax(-1)[..., :-1], 2)
    )
    assert found.labels.tolist() == [[0, 1]]
    torch.testing.assert_close(found.scores, logits.softmax(-1)[0, [2, 0], [0, 1]][None])
    torch.testing.assert_close(found.boxes, cxcywh_to_xyxy(boxes[:, [2, 0]]))


@pytest.mark.parametrize(
    "override",
    [
        "criterion.class_loss._target_=dino_d2.modeling.FocalLoss",
        "criterion.matcher._target_=dino_d2.modeling.HungarianMatcher",
        "decoder.softmax=False",
    ],
)
def test_parts_of_the_softmax_go_together(override):
    cfg = small(DETR, override)
    cfg.criterion.class_loss.pop("no_object_weight")
    with pytest.raises(ValueError, match="SoftmaxHead, SoftmaxLoss and SoftmaxMatcher go together"):
        instantiate(cfg)


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        (
            DETR,
            {"branches": [LazyCall(OneToManyHead)(num_classes=3, embed_dim=64)]},
            "OneToManyHead",
        ),
        (DN_DETR, {}, "BoxesOnly"),
        (TWO_STAGE, {}, "ProposalQueries"),
    ],
)
def test_parts_of_a_sigmoid_do_not_go_with_the_softmax(name, change, part):
    cfg, detr = small(name), small(DETR)
    cfg.decoder.softmax = True
    cfg.criterion.class_loss, cfg.criterion.matcher = (
        detr.criterion.class_loss,
        detr.criterion.matcher,
    )
    cfg.update(change)
    with pytest.raises(ValueError, match=f"^{part} needs sigmoid class scores"):
        instantiate(cfg)


def test_denoising_has_the_class_loss_of_the_head():
    cfg = small(DN_DETR)
    cfg.criterion.denoising_class_loss = LazyCall(SoftmaxLoss)()
    with pytest.raises(ValueError, match="but the model has a Linear and a SoftmaxLoss"):
        instantiate(cfg)


CONDITIONAL = "ConditionalPosition .* needs ConditionalDecoderLayers"


@pytest.mark.parametrize(
    ("name", "overrides", "complaint"),
    [
        (
            DETR,
            ["decoder.position_head._target_=dino_d2.modeling.positions.AnchorPosition"],
            "LearnedPosition",
        ),
        (
            DAB,
            ["decoder.position_head._target_=dino_d2.modeling.positions.LearnedPosition"],
            "AnchorPosition",
        ),
        (
            DAB,
            ["decoder.position_head._target_=dino_d2.modeling.positions.ConditionalPosition"],
            CONDITIONAL,
        ),
        (
            DAB_DETR,
            ["decoder.position_head._target_=dino_d2.modeling.positions.AnchorPosition"],
            CONDITIONAL,
        ),
        (
            DAB_DETR,
            ["decoder.layer=dino_d2.modeling.decoder_layers.DenseDecoderLayer"],
            CONDITIONAL,
        ),
    ],
)
def test_positions_and_layers_that_do_not_go_together_are_one_sentence(
    name, overrides, complaint, make_batch
):
    cfg = small(name)
    for override in overrides:
        key, value = override.split("=")
        *path, last = key.split(".")
        node = OmegaConf.select(cfg, ".".join(path))
        node[last] = locate(value)
    if name == DETR:
        cfg.decoder.position_head.embed_dim = 64
    with pytest.raises(ValueError, match=complaint):
        instantiate(cfg)(make_batch(1))


def test_a_dc5_resnet_has_bottlenecks():
    with pytest.raises(ValueError, match="is 18; it can be 50, 101 or 152"):
        dc5_stages(depth=18)


def test_the_row_of_no_object_stays_when_classes_change():
    source, target = (make_small(DETR).state_dict() for _ in range(2))
    state, new = select_classes(source, ["a", "b", "c"], ["c", "d", "a"], target)
    head = "decoder.class_heads.0."
    assert new == ["d"]
    for kind in ("weight", "bias"):
        assert torch.equal(state[f"{head}no_object.{kind}"], source[f"{head}no_object.{kind}"])
        assert torch.equal(state[head + kind][[0, 2]], source[head + kind][[2, 0]])


def test_dc5_keeps_the_stride_and_dilates_from_the_second_block_on():
    *_, last = dc5_stages(depth=50, stride_in_1x1=False)
    assert [block.conv2.dilation for block in last] == [(1, 1), (2, 2), (2, 2)]
    assert all(block.stride == 1 and block.conv2.stride == (1, 1) for block in last)


# ---- DAB-DETR and DN-DETR


def test_every_anchor_has_every_pattern(make_memory):
    selection = PatternQueries(num_queries=3, embed_dim=32, num_patterns=2)
    queries, _ = selection(make_memory())
    anchors, patterns = selection.anchors.weight.sigmoid(), selection.content.weight
    assert torch.equal(queries.reference[1], torch.cat([anchors, anchors]))
    assert torch.equal(queries.content[0], patterns[[0, 0, 0, 1, 1, 1]])


def test_without_patterns_content_is_zero_and_with_an_indicator_it_is_one_for_all(make_memory):
    queries, _ = PatternQueries(num_queries=3, embed_dim=32)(make_memory())
    assert queries.content.shape == (2, 3, 32) and not queries.content.any()
    selection = IndicatorPatternQueries(num_queries=3, embed_dim=32)
    queries, _ = selection(make_memory())
    expected = torch.cat([selection.content.weight[0], torch.zeros(1)])
    assert (queries.content == expected).all()


def test_attention_is_as_wide_and_high_as_the_anchor_and_the_content_say(randomise):
    head = randomise(ConditionalPosition(embed_dim=32), std=0.5)
    content, boxes = torch.randn(1, 4, 32), torch.rand(1, 4, 4) + 0.1
    for layer in (0, 2):
        position, place = head(Queries(content, boxes), None, layer).chunk(2, -1)
        scale = head.scale(content) if layer else torch.ones(1, 4, 32)
        width, height = head.size(content).sigmoid().unbind(-1)
        for i, (x, y, w, h) in enumerate(boxes[0].tolist()):
            code = sines([y, x, w, h], 16)
            torch.testing.assert_close(position[0, i], head.mlp(code), rtol=1e-4, atol=1e-4)
            expected = code[:32] * scale[0, i]
            expected[:16] *= height[0, i] / h
            expected[16:] *= width[0, i] / w
            torch.testing.assert_close(place[0, i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_products_of_content_and_of_position_are_added(make_memory, randomise, first):
    attention = randomise(ConditionalCrossAttention(embed_dim=32, num_heads=4, first=first))
    memory = make_memory(shapes=((3, 2),))
    x, position, sine = torch.randn(3, 2, 4, 32)
    query, key = attention.query_content(x), attention.key_content(memory.tokens)
    where, place = attention.query_sine(sine), attention.key_position(memory.position)
    if first:
        query, key = query + attention.query_position(position), key + place
    value = attention.value(memory.tokens)
    heads = []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        logits = query[..., part] @ key[..., part].mT + where[..., part] @ place[..., part].mT
        heads.append((logits / 16**0.5).softmax(-1) @ value[..., part])
    expected = attention.output(torch.cat(heads, -1))
    torch.testing.assert_close(attention(x, position, sine, memory), expected)


@pytest.mark.parametrize("kind", ["bool", "added", "of each head"])
def test_queries_do_not_see_what_the_mask_forbids(randomise, kind):
    attention = randomise(ConditionalSelfAttention(embed_dim=32, num_heads=4))
    x, position = torch.randn(2, 2, 5, 32)
    forbidden = torch.zeros(5, 5, dtype=torch.bool)
    forbidden[:2, 2:] = True
    mask = {
        "bool": forbidden,
        "added": torch.zeros(5, 5).masked_fill(forbidden, -torch.inf),
        "of each head": forbidden.expand(2 * 4, -1, -1),
    }[kind]
    alone = attention(x[:, :2], position[:, :2])
    torch.testing.assert_close(attention(x, position, mask)[:, :2], alone)
    assert not torch.allclose(attention(x, position)[:, :2], alone, atol=1e-3)


# ---- Deformable DETR


def test_the_inverse_sigmoid_is_cut_off_where_the_config_says():
    x = torch.tensor([1e-7, 0.5, 0.9999])
    for eps in (1e-3, 1e-5):
        expected = torch.tensor([eps, 0.5, min(0.9999, 1 - eps)])
        torch.testing.assert_close(refine(x[None, :2], torch.zeros(1, 2), eps)[0], expected[:2])
    assert make_small(PLAIN).decoder.eps == 1e-5 and make_small(DAB).decoder.eps == 1e-3


def test_the_divisors_of_the_generalized_iou_grow_by_what_the_config_says():
    a, b = torch.tensor([0.0, 0.0, 0.2, 0.1]), torch.tensor([0.1, 0.0, 0.3, 0.2])
    # overlap 0.01, union 0.02 + 0.04 - 0.01, hull 0.3 * 0.2
    expected = 0.01 / (0.05 + 0.01) - 0.01 / (0.06 + 0.01)
    assert generalized_iou(a, b, 0.01).item() == pytest.approx(expected)
    for name, eps in [(PLAIN, 0), (DAB, 1e-6), (DN_DETR, 1e-6)]:
        criterion = make_small(name).criterion
        assert criterion.giou_eps == criterion.matcher.giou_eps == eps


def test_queries_that_look_at_points_are_the_same_for_all_images(make_memory):
    selection = PointQueries(num_queries=5, embed_dim=32)
    queries, proposals = selection(make_memory(batch=3))
    others, _ = selection(make_memory(batch=3))
    assert proposals is None
    assert [part.shape for part in queries] == [(3, 5, 32), (3, 5, 2), (3, 5, 32)]
    for part, other in zip(queries, others, strict=True):
        assert torch.equal(part[0], part[2]) and torch.equal(part, other)
    assert torch.equal(queries.content[0], selection.content.weight)
    assert torch.equal(queries.position[0], selection.position.weight)


def test_every_part_of_a_query_that_looks_at_a_point_is_learned(make_memory):
    selection = PointQueries(num_queries=5, embed_dim=32)
    queries, _ = selection(make_memory(batch=3))
    for part, learned in [
        (queries.content, selection.content.weight),
        (queries.position, selection.position.weight),
        (queries.reference, selection.position.weight),
        (queries.reference, selection.reference_points.weight),
    ]:
        assert torch.autograd.grad(part.sum(), learned, retain_graph=True)[0].all()


def test_a_point_is_a_linear_function_of_the_position(make_memory, randomise):
    selection = randomise(PointQueries(num_queries=5, embed_dim=32), std=1.0)
    reference = selection(make_memory())[0].reference[1]
    weight, bias = selection.reference_points.weight, selection.reference_points.bias
    for position, point in zip(selection.position.weight, reference, strict=True):
        expected = 1 / (1 + (-(weight * position).sum(1) - bias).exp())
        torch.testing.assert_close(point, expected)


def test_without_refinement_all_layers_look_at_the_same_points(decoded):
    model, calls, output = decoded(PLAIN)
    positions, references = ([args[i] for args in calls] for i in (1, 2))
    assert references[0].shape == (2, 10, 2)
    for position, reference in zip(positions, references, strict=True):
        assert torch.equal(position[0], model.query_selection.position.weight)
        assert torch.equal(reference, references[0])
    first, second = output.result.layers[:2]
    assert not torch.allclose(first.boxes, second.boxes, atol=1e-3)


def test_refinement_makes_boxes_of_the_points_after_the_first_layer(decoded):
    model, calls, output = decoded(REFINE)
    positions, references = ([args[i] for args in calls] for i in (1, 2))
    assert [reference.shape[-1] for reference in references] == [2, 4, 4]
    for previous, reference in zip(output.result.layers, references[1:], strict=False):
        torch.testing.assert_close(reference, previous.boxes)
    assert all(torch.equal(x[0], model.query_selection.position.weight) for x in positions)


@pytest.mark.parametrize("name", [PLAIN, REFINE])
def test_boxes_start_at_the_points_with_an_eighth_of_the_image(make_batch, name):
    model = make_small(name)
    first, *_ = run_detector(model, model.preprocess_images(make_batch(1))).result.layers
    selection = model.query_selection
    points = selection.reference_points(selection.position.weight).sigmoid()
    # the sigmoid of -2 is 0.1192
    expected = torch.cat([points, torch.full((10, 2), 0.1192)], 1)
    torch.testing.assert_close(first.boxes[0], expected, rtol=0, atol=1e-4)


# ---- two-stage Deformable DETR


@pytest.fixture
def memory(make_memory):
    """36 + 9 tokens; the second image has padding on the right."""
    padding = torch.zeros(2, 48, 48, dtype=torch.bool)
    padding[1, :, 32:] = True
    return make_memory(shapes=((6, 6), (3, 3)), padding=padding)


def propose(memory, logits):
    """A selection of six queries, and what it gives when the tokens' logits are (B, S, K)."""
    selection = ProposalQueries(num_queries=6, embed_dim=32, num_classes=NUM_CLASSES)
    selection.class_head.forward = lambda tokens: logits
    return selection, *selection(memory)


def test_proposals_are_selected_by_the_first_class_alone(memory):
    logits = torch.randn(2, 45, NUM_CLASSES)
    logits[..., 1:] *= 10
    _, queries, _ = propose(memory, logits)
    anchors = proposal_anchors(memory).sigmoid()
    for image in range(2):
        best = sorted(range(45), key=lambda token: -logits[image, token, 0].item())[:6]
        # a new box head leaves anchors where they are
        torch.testing.assert_close(queries.reference[image], anchors[image, best])
    assert not queries.reference.requires_grad


def test_every_token_is_a_proposal(memory):
    logits = torch.randn(2, 45, NUM_CLASSES)
    _, _, proposals = propose(memory, logits)
    assert torch.equal(proposals.logits, logits)
    torch.testing.assert_close(proposals.boxes, proposal_anchors(memory).sigmoid())
    assert memory.padding.any() and (proposals.boxes[memory.padding] == 1).all()
    assert proposals.boxes.requires_grad


def test_queries_of_proposals_are_made_of_sines_of_their_boxes(memory):
    selection, queries, _ = propose(memory, torch.randn(2, 45, NUM_CLASSES))
    for content, box, position in zip(*(part[1] for part in queries), strict=True):
        # x, y, w, h; 32 / 2 channels each
        expected = selection.box_norm(selection.box_proj(sines(box.tolist(), 16)))
        torch.testing.assert_close(position, expected[:32], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(content, expected[32:], rtol=1e-4, atol=1e-4)


def test_the_features_of_proposals_do_not_become_queries(memory):
    selection, queries, _ = propose(memory, torch.randn(2, 45, NUM_CLASSES))
    others, _ = selection(memory._replace(tokens=torch.randn_like(memory.tokens)))
    assert all(torch.equal(part, other) for part, other in zip(queries, others, strict=True))


def focal(logit, wanted):
    p = 1 / (1 + exp(-logit))
    return -0.25 * (1 - p) ** 2 * log(p) if wanted else -0.75 * p**2 * log(1 - p)


def test_all_proposals_are_supervised_and_an_object_is_of_the_first_class(make_predictions):
    target = Target(torch.tensor([2]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    logits = torch.tensor([1.0, -1.0, -1.0]).expand(1, 7, 3)
    boxes = torch.tensor([0.1, 0.1, 0.1, 0.1]).repeat(1, 7, 1)
    boxes[0, 4] = torch.tensor([0.5, 0.5, 0.3, 0.2])
    output = detector_output([make_predictions(1)], Predictions(logits, boxes), [], None)
    losses = AllProposals(matcher=HungarianMatcher())(output, [target])
    # one of seven is the object, and its class is 0
    expected = focal(1, True) + 6 * focal(1, False) + 14 * focal(-1, False)
    assert losses["loss_class_enc"].item() == pytest.approx(expected)
    # a width of 0.3 and not 0.2, the overlap 2/3 of the union
    assert losses["loss_bbox_enc"].item() == pytest.approx(5 * 0.1)
    assert losses["loss_giou_enc"].item() == pytest.approx(2 * (1 - 2 / 3))


def test_labels_matter_to_the_decoder_but_not_to_the_proposals(make_predictions, make_targets):
    targets = make_targets(2, 1)
    others = [target._replace(labels=(target.labels + 1) % NUM_CLASSES) for target in targets]
    layers = [make_predictions(2) for _ in range(2)]
    output = detector_output(layers, make_predictions(2, num_queries=9), [], None)
    criterion = AllProposals(matcher=HungarianMatcher())
    losses, changed = criterion(output, targets), criterion(output, others)
    for name, loss in losses.items():
        if name.endswith("_enc"):
            assert torch.equal(loss, changed[name])
    assert losses["loss_class"] != changed["loss_class"]
    assert losses["loss_class_0"] != changed["loss_class_0"]
    usual = SetCriterion(matcher=HungarianMatcher())(with_result(output, proposals=None), targets)
    assert all(torch.equal(loss, losses[name]) for name, loss in usual.items())


# ---- DAB-Deformable-DETR


def test_the_content_scales_the_position_except_in_the_first_layer(randomise):
    head = randomise(ScaledAnchorPosition(embed_dim=32), std=0.5)
    queries = Queries(torch.randn(1, 4, 32), torch.rand(1, 4, 4))
    memory = FeaturePyramid(*[None] * 3, torch.ones(1, 4, 2), ())  # of an image without padding

    def mlp(layers, x):
        (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in layers)
        return w2 @ (w1 @ x + b1).clamp(min=0) + b2

    for i in range(4):
        x, y, w, h = queries.reference[0, i].tolist()
        position = mlp(head.mlp.layers, sines([y, x, w, h], 16))
        scaled = position * mlp(head.scale.layers, queries.content[0, i])
        for layer, expected in enumerate([position, scaled, scaled]):
            torch.testing.assert_close(
                head(queries, memory, layer)[0, i], expected, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", [DAB, DN])
def test_learned_anchors_are_refined_from_the_first_layer_on(decoded, name):
    model, calls, output = decoded(name)
    anchors = model.query_selection.anchors.weight.sigmoid().expand(2, -1, -1)
    expected = [anchors, *(layer.boxes for layer in output.result.layers[:-1])]
    for (_, _, reference, *_), boxes in zip(calls, expected, strict=True):
        torch.testing.assert_close(reference, boxes)


# ---- DN-Deformable-DETR


def make_denoising(**options):
    """That of the config, with 8 channels."""
    cfg = load(DN, f"num_classes={NUM_CLASSES}", "encoder.embed_dim=8").denoising
    cfg.update(options)
    return instantiate(cfg)


def test_the_last_channel_of_a_matching_query_is_zero(make_memory):
    selection = IndicatorQueries(num_queries=5, embed_dim=32, num_classes=NUM_CLASSES)
    queries, _ = selection(make_memory())
    assert queries.content.shape == (2, 5, 32) and not queries.content[..., -1].any()
    assert torch.equal(queries.content[0, :, :-1], selection.content.weight)
    assert torch.equal(queries.reference[1], selection.anchors.weight.sigmoid())


def test_the_last_channel_of_a_denoising_query_tells_boxes_from_empty_slots(make_targets):
    denoising = make_denoising(label_noise=0.0)
    targets = make_targets(1, 3, 0)
    content, reference, _ = denoising(targets).queries
    expected = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 0, 0]]).tile(5)
    assert torch.equal(content[..., -1], expected)
    labels = denoising.label_embed(targets[1].labels).tile(5, 1)
    assert torch.equal(content[1, :, :-1], labels)
    assert not content[expected == 0].any() and (reference[expected == 0] == 0.5).all()


@pytest.mark.parametrize("counts", [(1,), (2, 0, 3), (60, 1)], ids=str)
def test_the_number_of_groups_is_fixed(make_targets, counts):
    noised = make_denoising()(make_targets(*counts))
    assert noised.repeats == 5
    expected = [group for group in range(1, 6) for _ in range(max(counts))]
    assert noised.groups.tolist() == expected
    assert len(noised.match.queries) == 5 * sum(counts)


@pytest.mark.parametrize(("budget", "slots"), [(500, 100), (12, 2)])
def test_groups_have_room_for_their_share_of_the_budget(make_targets, budget, slots):
    noised = make_denoising(budget=budget)(make_targets(300, 1))
    assert noised.groups.tolist() == [group for group in range(1, 6) for _ in range(slots)]
    assert len(noised.match.queries) == 5 * (slots + 1)


@pytest.mark.parametrize("groups", [0, 5])
def test_a_budget_without_room_for_a_box_in_every_group_is_refused(groups):
    with pytest.raises(ValueError, match=f"{groups} groups .* budget of 4"):
        make_denoising(groups=groups, budget=4)


def test_centre_and_size_of_a_box_are_noised_by_themselves():
    boxes = torch.tensor([0.4, 0.6, 0.2, 0.3]).repeat(100, 1)
    noised = make_denoising()([Target(torch.zeros(100, dtype=torch.int64), boxes)])
    reach = 0.4 * torch.tensor([0.1, 0.15, 0.2, 0.3])  # half the size, and the size
    noise = (noised.queries.reference[0] - boxes[0]) / reach
    assert noise.abs().max() <= 1 + 1e-4
    # uniform in [-1, 1]: mean 0, mean distance 1/2, and none of the four knows of the others
    assert noise.mean(0).abs().max() < 0.1
    torch.testing.assert_close(noise.abs().mean(0), torch.full((4,), 0.5), atol=0.05, rtol=0)
    assert (torch.corrcoef(noise.T) - torch.eye(4)).abs().max() < 0.15


def test_noised_centres_and_sizes_stay_between_zero_and_one():
    boxes = torch.tensor([0.98, 0.02, 1.0, 0.9]).repeat(100, 1)
    noised = make_denoising()([Target(torch.zeros(100, dtype=torch.int64), boxes)])
    reference = noised.queries.reference[0]
    # the logits of the decoder end at 0.001 and 0.999; about half of the draws go beyond
    beyond = torch.isclose(reference, torch.tensor([0.999, 0.001, 0.999, 0.999]), atol=1e-6)
    assert (beyond.float().mean(0) > 0.2).all()
    assert 0.001 - 1e-6 <= reference.min() and reference.max() <= 0.999 + 1e-6


def test_a_fifth_of_the_labels_is_drawn_anew():
    denoising = make_denoising(budget=50_000)
    target = Target(torch.ones(10_000, dtype=torch.int64), torch.full((10_000, 4), 0.5))
    content = denoising([target]).queries.content[0, :, :-1]
    rates = [
        (content == row).all(1).float().mean().item() for row in denoising.label_embed.weight[:3]
    ]
    # 0.2 among three classes, one of which is right; deviation sqrt(0.067 * 0.93 / 50000) = 0.001
    assert rates == pytest.approx([0.2 / 3, 0.8 + 0.2 / 3, 0.2 / 3], abs=0.006)


@pytest.mark.parametrize(("criterion", "matters"), [(BoxesOnly, False), (SetCriterion, True)])
def test_empty_slots_are_not_supervised(make_predictions, make_targets, criterion, matters):
    criterion, targets = criterion(matcher=HungarianMatcher()), make_targets(1, 3)
    noised = make_denoising()(targets)
    denoised = [make_predictions(2, num_queries=15) for _ in range(2)]
    output = detector_output([make_predictions(2)], None, denoised, noised)
    losses = criterion(output, targets)
    empty = torch.arange(15) % 3 > 0  # of the first image, which has one box for three slots
    denoised[1].logits[0, empty] += 3
    for name, loss in criterion(output, targets).items():
        assert torch.equal(loss, losses[name]) == (not matters or name != "loss_class_dn")


def test_images_are_told_apart_where_empty_slots_are_not_supervised(make_predictions, make_targets):
    # no slot is empty, so both criteria are the same, also where a loss looks at whole images
    targets = make_targets(3, 3)
    noised = make_denoising()(targets)
    denoised = [make_predictions(2, num_queries=15) for _ in range(2)]
    output = detector_output([make_predictions(2)], None, denoised, noised)
    options = {"matcher": HungarianMatcher(), "class_loss": PositionSupervisedLoss()}
    losses = BoxesOnly(**options)(output, targets)
    torch.testing.assert_close(losses, SetCriterion(**options)(output, targets))


def test_denoising_losses_are_means_over_boxes_and_groups(make_targets):
    targets = make_targets(1, 3)
    noised = make_denoising()(targets)
    boxes = torch.zeros(2, 15, 4)
    boxes[0] = targets[0].boxes
    boxes[1] = targets[1].boxes.tile(5, 1)
    boxes[..., 0] += 0.1
    logits = torch.full((2, 15, NUM_CLASSES), -1.0)
    for image, target in enumerate(targets):
        slots = torch.arange(15).view(5, 3)[:, : len(target.labels)]
        logits[image, slots, target.labels] = 1.0
    # as many predictions that fit as denoising queries; the empty slots would cost
    logits[0, torch.arange(15) % 3 > 0] = 5.0
    output = detector_output(
        [Predictions(logits, boxes)], None, [Predictions(logits, boxes)], noised
    )
    losses = BoxesOnly(matcher=HungarianMatcher())(output, targets)
    # each box costs the same: its class is right, the others are not there, x is 0.1 off
    expected = focal(1, True) + 2 * focal(-1, False)
    assert losses["loss_class_dn"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss_bbox_dn"].item() == pytest.approx(5 * 0.1, rel=1e-5)


def test_without_boxes_denoising_costs_nothing(make_predictions, make_targets):
    targets = make_targets(0, 0)
    noised = make_denoising()(targets)
    denoised = [make_predictions(2, num_queries=1)]
    output = detector_output([make_predictions(2)], None, denoised, noised)
    losses = BoxesOnly(matcher=HungarianMatcher())(output, targets)
    assert noised.repeats == 1 and all(loss.isfinite() for loss in losses.values())
    assert [losses[f"loss_{kind}_dn"].item() for kind in ("class", "bbox", "giou")] == [0, 0, 0]


@pytest.mark.nightly
@pytest.mark.parametrize("name", [DETR, DN_DETR])
@pytest.mark.parametrize("kind", [".pt2", ".onnx"])
def test_models_with_dense_attention_are_exported(name, kind, randomise, tmp_path):
    model = randomise(make_small(name)).eval()
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [48, 80]])
    with torch.no_grad():
        expected = Exportable(model)(images, sizes)
    path = tmp_path / f"model{kind}"
    save(export(model, (64, 96)), path, About(["a", "b", "c"], (64, 96), "RGB", None))
    found = Detections(*map(torch.as_tensor, Exported(path)(images, sizes)))
    assert compare(Detections(*expected), found, threshold=0.0).tolerable
