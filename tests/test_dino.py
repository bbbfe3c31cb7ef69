import copy
import pickle
from itertools import product

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from outputs import run_detector
from torch import nn

from dino_d2 import add_dino_config, modeling
from dino_d2.modeling.fold_norms import fold_norms
from dino_d2.solver import ClippedAdamW, parameter_groups

SELECTIONS = (modeling.StaticQueries, modeling.PureQuerySelection, modeling.MixedQuerySelection)
DENOISING = (None, modeling.Denoising, modeling.ContrastiveDenoising)
VARIANTS = [
    pytest.param(
        {
            "query_selection": selection,
            "denoising": denoising,
            "look_forward": look_forward,
            "shared_heads": shared_heads,
        },
        id=f"{selection.__name__}-{getattr(denoising, '__name__', None)}-{look_forward}"
        f"-{'shared' if shared_heads else 'per_layer'}",
    )
    for selection, denoising, look_forward, shared_heads in product(
        SELECTIONS, DENOISING, (1, 2), (True, False)
    )
]
SIZES = [(64, 64), (48, 80), (64, 40), (48, 80)]


def total(losses):
    return sum(losses.values())


def detect(model, batch):
    """The detections of a batch, as tensors."""
    model.eval()
    with torch.no_grad():
        results = [x["instances"] for x in model(batch)]
    return [(x.pred_boxes.tensor, x.scores, x.pred_classes) for x in results]


# ---- training


@pytest.mark.parametrize("counts", [(2, 1), (0, 0)], ids=["boxes", "no_boxes"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_every_parameter(make_dino, make_batch, variant, counts):
    model = make_dino(**variant)
    losses = model(make_batch(*counts))
    total(losses).backward()
    assert total(losses).isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_every_weight_is_moved_by_the_losses(make_dino, make_batch, randomise):
    model = randomise(make_dino())
    total(model(make_batch(2, 1))).backward()
    assert not [name for name, p in model.named_parameters() if not p.grad.any()]


def test_dropout_acts_in_training_only(make_dino, make_batch):
    model, batch = make_dino(denoising=None, dropout=0.5), make_batch(2)
    assert model(batch)["loss_class"] != model(batch)["loss_class"]
    assert torch.equal(detect(model, batch)[0][1], detect(model, batch)[0][1])


@pytest.mark.parametrize("denoising", DENOISING)
def test_losses_of_every_stage_are_there(make_dino, make_batch, denoising):
    losses = make_dino(denoising=denoising)(make_batch(2, 1))
    suffixes = ["", "_0", "_enc"] + ["_dn", "_dn_0"] * (denoising is not None)
    kinds = ("loss_class", "loss_bbox", "loss_giou")
    assert set(losses) == {kind + suffix for kind in kinds for suffix in suffixes}


def test_the_main_loss_is_that_of_a_model_without_denoising(make_dino, make_batch, randomise):
    model, batch = randomise(make_dino(), std=0.1), make_batch(2, 1)
    losses = model(batch)
    model.denoising = None
    for name, expected in model(batch).items():
        torch.testing.assert_close(losses[name], expected, rtol=1e-4, atol=1e-5)


def test_matching_and_denoising_queries_are_told_apart(make_dino, make_batch):
    model, batch = make_dino(num_queries=20, budget=4), make_batch(2, 1)
    output = run_detector(model, model.preprocess_images(batch), model.prepare_targets(batch))
    assert [x.logits.shape for x in output.result.layers] == [(2, 20, 3)] * 2
    # two groups of two positives and two negatives
    assert [x.boxes.shape for x in output.named("dn").layers] == [(2, 8, 4)] * 2
    assert output.result.proposals.boxes.shape == (2, 20, 4)


def test_a_training_step_under_autocast_is_finite_and_its_boxes_are_wide(make_dino, make_batch):
    model, batch = make_dino(), make_batch(2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        targets = model.prepare_targets(batch)
        output = run_detector(model, model.preprocess_images(batch), targets)
        losses = model.criterion(output, targets)
    assert output.result.layers[0].logits.dtype == torch.bfloat16  # or nothing was cast
    stages = [*output.result.layers, *output.named("dn").layers, output.result.proposals]
    assert all(stage.boxes.dtype == torch.float32 for stage in stages)
    total(losses).backward()
    assert total(losses).isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_step_on_the_device_is_that_on_the_cpu(make_dino, make_batch, device):
    model, batch = make_dino(denoising=None), make_batch(2, 1)
    expected = model(batch)
    for name, loss in model.to(device)(batch).items():
        torch.testing.assert_close(loss.cpu(), expected[name], rtol=1e-3, atol=1e-3)


# ---- inputs


def test_an_empty_batch_is_refused_in_training(make_dino):
    with pytest.raises(ValueError, match="no images"):
        make_dino()([])


def test_an_empty_batch_gives_no_detections(make_dino):
    assert make_dino().eval()([]) == []


# ---- memory and speed


def test_recomputed_stages_change_no_loss_and_no_gradient(make_dino, make_batch):
    model, batch = make_dino(dropout=0.1), make_batch(2, 0)

    def step(*stages):
        model.recompute_backbone = "backbone" in stages
        model.encoder.recompute = "encoder" in stages
        model.decoder.recompute = "decoder" in stages
        torch.manual_seed(1)
        losses = model(batch)
        return losses, torch.autograd.grad(sum(losses.values()), list(model.parameters()))

    losses, grads = step()
    for stages in (["backbone"], ["encoder"], ["decoder"], ["backbone", "encoder", "decoder"]):
        again, new_grads = step(*stages)
        assert all(torch.equal(losses[name], again[name]) for name in losses)
        assert all(map(torch.equal, grads, new_grads))


@pytest.mark.parametrize("stage", ["backbone", "encoder", "decoder"])
def test_a_recomputed_stage_keeps_less_for_the_backward_pass(small_cfg, make_batch, stage):
    def kept(stages):
        small_cfg.MODEL.DINO.ACTIVATION_CHECKPOINTING = stages
        torch.manual_seed(0)
        model, sizes = build_model(small_cfg).train(), {}

        def note(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            losses = model(make_batch(2, 1, sizes=[(96, 128)] * 2))
        assert losses
        return sum(sizes.values())

    assert kept([stage]) < kept([])


def test_a_stage_that_cannot_be_recomputed_is_named(small_cfg):
    small_cfg.MODEL.DINO.ACTIVATION_CHECKPOINTING = ["encoder", "neck"]
    with pytest.raises(ValueError, match="names 'neck', which is no stage; available: backbone"):
        build_model(small_cfg)


def test_folded_norms_change_nothing_but_the_time(small_cfg):
    model = build_model(small_cfg).eval()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in module.buffers():
                buffer.uniform_(0.5, 1.5)
    image = torch.randn(1, 3, 96, 128)
    expected = model.backbone(image)
    assert fold_norms(model) is model
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    for name, feature in model.backbone(image).items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-3, atol=1e-3)


def test_norms_that_are_being_trained_are_not_folded():
    trained, fixed, group = nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval(), nn.GroupNorm(2, 4)
    convs = [Conv2d(3, 4, 1, norm=norm, bias=False) for norm in (trained, fixed, group)]
    fold_norms(nn.ModuleList(convs))
    assert [conv.norm is None for conv in convs] == [False, True, False]


@pytest.mark.parametrize("label", [3, 90, -1])
def test_a_label_that_the_model_does_not_have_is_named_with_its_file(make_dino, make_batch, label):
    batch = make_batch(1, 2)
    batch[1]["instances"].gt_classes[1] = label
    batch[1]["file_name"] = "cats/7.jpg"
    with pytest.raises(ValueError, match=rf"cats/7\.jpg .*class {label}\b.* 3 classes"):
        make_dino()(batch)


@pytest.mark.parametrize("training", [True, False])
def test_inputs_are_never_mutated(make_dino, make_batch, training):
    batch = make_batch(2, 0, 1, 3, sizes=SIZES)
    before = copy.deepcopy(batch)
    make_dino().train(training)(batch)
    for x, y in zip(batch, before, strict=True):
        assert x.keys() == y.keys() and torch.equal(x["image"], y["image"])
        assert torch.equal(x["instances"].gt_boxes.tensor, y["instances"].gt_boxes.tensor)
        assert torch.equal(x["instances"].gt_classes, y["instances"].gt_classes)


def test_boxes_are_relative_to_the_image_without_padding(make_dino):
    instances = Instances((40, 80), gt_boxes=Boxes(torch.tensor([[8.0, 10.0, 24.0, 30.0]])))
    instances.gt_classes = torch.tensor([2])
    (target,) = make_dino().prepare_targets([{"instances": instances}])
    # centre (16, 20), size (16, 20), of 80 x 40
    torch.testing.assert_close(target.boxes, torch.tensor([[0.2, 0.5, 0.2, 0.5]]))
    assert target.labels.tolist() == [2]


def test_images_are_normalised_and_padded_with_zeros(make_dino):
    model = make_dino()
    images = [
        torch.tensor([120, 115, 105]).view(3, 1, 1).expand(3, 4, 6) + torch.tensor([[[0, 60] * 3]]),
        torch.zeros(3, 5, 3),
    ]
    padded = model.preprocess_images([{"image": image} for image in images])
    assert padded.tensor.shape == (2, 3, 5, 6) and padded.image_sizes == [(4, 6), (5, 3)]
    # red is 60 wide: 0 and 1 in turns
    assert padded.tensor[0, 0, 2].tolist() == [0, 1, 0, 1, 0, 1]
    mask = modeling.dino.padding_mask(padded)
    assert mask[0].nonzero().tolist() == [[4, column] for column in range(6)]
    assert torch.equal(mask[1], torch.arange(6).ge(3).expand(5, 6))
    assert not padded.tensor.movedim(1, -1)[mask].any()


# ---- inference


def test_batching_never_changes_a_detection_nor_the_order(make_dino, make_batch, randomise):
    model, batch = randomise(make_dino(), std=0.1), make_batch(0, 0, 0, 0, sizes=SIZES)
    together = detect(model, batch)
    for x, result in zip(batch, together, strict=True):
        (alone,) = detect(model, [x])
        for actual, expected in zip(result, alone, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    assert not torch.equal(together[1][1], together[3][1])  # same size, another image


def test_a_detection_is_the_same_in_every_run(make_dino, make_batch, randomise):
    model, batch = randomise(make_dino(), std=0.1), make_batch(0, 0, 0, 0, sizes=SIZES)
    for first, second in zip(detect(model, batch), detect(model, batch), strict=True):
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(("channels", "colours"), [(1, 3), (3, 1)])
def test_images_of_other_channels_than_the_model_are_one_sentence(make_dino, channels, colours):
    sentence = f"images have {channels} channels?, .* for {colours}: change INPUT"
    with pytest.raises(ValueError, match=sentence):
        make_dino(colours=colours).eval()([{"image": torch.zeros(channels, 64, 64)}])


def test_inference_draws_no_random_number(make_dino, make_batch):
    model, batch = make_dino(dropout=0.5), make_batch(2)
    state = torch.get_rng_state()
    detect(model, batch)
    assert torch.equal(state, torch.get_rng_state())


def test_detections_are_in_the_resolution_that_is_asked_for(make_dino, make_batch):
    model, (x,) = make_dino(), make_batch(0, sizes=[(48, 80)])
    ((boxes, scores, _),) = detect(model, [x])
    ((scaled, same, _),) = detect(model, [{**x, "height": 96, "width": 40}])
    torch.testing.assert_close(scaled, boxes * torch.tensor([0.5, 2.0, 0.5, 2.0]))
    assert torch.equal(scores, same)
    (instances,) = model([{**x, "height": 96, "width": 40}])
    assert instances["instances"].image_size == (96, 40)


def test_there_are_as_many_detections_as_asked_for(make_dino, make_batch):
    ((_, scores, _),) = detect(make_dino(max_detections=7), make_batch(0))
    assert len(scores) == 7


def test_nms_splits_the_detections_of_each_image(make_dino, make_batch, randomise):
    model, batch = randomise(make_dino(), std=0.1).eval(), make_batch(0, 0, 0, sizes=SIZES[:3])
    model.decoder.box_heads[0].layers[-1].bias.data[2:] = 1.5  # boxes large enough to overlap
    plain = model(batch)
    model.nms = 0.5
    for before, after in zip(plain, model(batch), strict=True):
        parts = [before["instances"], after["instances"], after["suppressed"]]
        whole, kept, suppressed = parts
        assert len(kept) and len(suppressed)
        scores, order = torch.cat([kept.scores, suppressed.scores]).sort(descending=True)
        assert torch.equal(scores, whole.scores)
        boxes = torch.cat([kept.pred_boxes.tensor, suppressed.pred_boxes.tensor])[order]
        torch.testing.assert_close(boxes, whole.pred_boxes.tensor)
        # Of the kept ones no two of a class overlap more, and one of them overlaps each other one.
        ious = [pairwise_iou(x.pred_boxes, kept.pred_boxes) for x in (kept, suppressed)]
        for x, iou in zip((kept, suppressed), ious, strict=True):
            iou[x.pred_classes[:, None] != kept.pred_classes] = 0
        assert ious[0].fill_diagonal_(0).max() <= 0.5 < ious[1].amax(1).min()
        assert all(x.image_size == whole.image_size for x in parts)


@pytest.mark.parametrize("nms", [0, -0.1, 1.5, "0.8", True])
def test_nms_is_a_share_of_the_boxes(small_cfg, nms):
    small_cfg.TEST.NMS = nms
    with pytest.raises(ValueError, match="nms .TEST.NMS, model.nms. is .*; it has to be a"):
        build_model(small_cfg)


def test_small_images_have_fewer_queries(make_dino, make_batch):
    # 32 x 32 have 16 + 4 + 1 + 1 tokens, of three classes each
    model = make_dino(num_queries=100)
    (result,) = model.eval()(make_batch(0, sizes=[(32, 32)]))
    assert 0 < len(result["instances"]) <= 22 * 3
    model.train()
    assert total(model(make_batch(2, sizes=[(32, 32)]))).isfinite()


def fill(module):
    """Weights without a random generator, which may change from one version to the next."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            wave = torch.sin(torch.arange(1.0, parameter.numel() + 1) * (1.7 + 0.1 * number))
            parameter.copy_(0.3 * wave.view_as(parameter))


def test_predictions_are_those_recorded(make_dino):
    model = make_dino().eval()
    fill(model)
    image = 128 + 100 * torch.sin(torch.arange(3 * 48 * 64.0) * 0.37).view(3, 48, 64)
    with torch.no_grad():
        last = run_detector(model, model.preprocess_images([{"image": image}])).result.layers[-1]
    boxes = torch.tensor([[0.9293, 0.65879, 0.02674, 0.08037], [0.8696, 0.47415, 0.02673, 0.08036]])
    logits = torch.tensor([[0.20764, 0.33277, -0.0754], [0.19196, 0.34846, -0.09104]])
    torch.testing.assert_close(last.boxes[0, :2], boxes, rtol=0, atol=1e-4)
    torch.testing.assert_close(last.logits[0, :2], logits, rtol=0, atol=1e-4)


# ---- the module


def test_state_dict_keys_are_those_documented(make_dino):
    families = {".".join(name.split(".")[:2]) for name in make_dino().state_dict()}
    # checkpoints depend on these names
    assert families == {
        "backbone.convs",
        "neck.projections",
        "neck.downsamples",
        "encoder.level_embed",
        "encoder.layers",
        "query_selection.memory_proj",
        "query_selection.memory_norm",
        "query_selection.class_head",
        "query_selection.box_head",
        "query_selection.content",
        "denoising.label_embed",
        "decoder.layers",
        "decoder.position_head",
        "decoder.norm",
        "decoder.class_heads",
        "decoder.box_heads",
    }


@pytest.mark.parametrize("shared_heads", [True, False])
def test_no_tensor_has_two_names(make_dino, shared_heads):
    tensors = make_dino(shared_heads=shared_heads).state_dict().values()
    assert len({x.data_ptr() for x in tensors}) == len(tensors)


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copy_detects_the_same_and_shares_nothing(make_dino, make_batch, clone):
    model, batch = make_dino(), make_batch(0)
    twin = clone(model)
    for a, b in zip(detect(model, batch)[0], detect(twin, batch)[0], strict=True):
        assert torch.equal(a, b)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in pointers for p in twin.parameters())


def test_forward_writes_no_state(make_dino, make_batch):
    model = make_dino()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    model(make_batch(2, 0))
    detect(model, make_batch(0))
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# ---- built from a config


@pytest.fixture
def cfg():
    """DINO-4scale on a ResNet-50, everything else at its default."""
    cfg = get_cfg()
    add_dino_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "DINO"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.DINO.NUM_CLASSES = 91
    return cfg


@pytest.fixture
def small_cfg(cfg):
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    c = cfg.MODEL.DINO
    c.EMBED_DIM, c.FFN_DIM, c.NUM_QUERIES, c.NUM_CLASSES = 64, 64, 10, 3
    c.ENCODER_LAYERS = c.DECODER_LAYERS = 1
    return cfg


def test_the_model_of_the_paper_has_47_million_parameters(cfg):
    model = build_model(cfg)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # "47M" in the official table, which counts what is trained: not the stem and not res2
    assert trained == 46_670_782


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("denoising", DENOISING)
def test_a_config_names_the_selection_and_the_denoising(small_cfg, selection, denoising):
    small_cfg.MODEL.DINO.QUERY_SELECTION = selection.__name__
    small_cfg.MODEL.DINO.DENOISING.NAME = denoising.__name__ if denoising else ""
    small_cfg.MODEL.DINO.DENOISING.BUDGET = 17
    model = build_model(small_cfg)
    assert type(model.query_selection) is selection
    assert type(model.denoising) is (denoising or type(None))
    assert denoising is None or model.denoising.budget == 17


def test_a_resnet_trains_and_detects(small_cfg, make_batch):
    model = build_model(small_cfg)
    total(model(make_batch(2, 0))).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert len(detect(model, make_batch(0))[0][1]) == 10 * 3


# ---- it learns


def squares():
    """Two images with a red and a blue rectangle each, on grey."""
    places = [[(8, 8, 30, 26), (36, 30, 58, 60)], [(34, 6, 60, 24), (6, 36, 26, 58)]]
    batch = []
    for corners in places:
        image = torch.full((3, 64, 64), 110.0)
        for channel, (x0, y0, x1, y1) in zip((0, 2), corners, strict=True):
            image[:, y0:y1, x0:x1] = 20
            image[channel, y0:y1, x0:x1] = 240
        instances = Instances((64, 64), gt_boxes=Boxes(torch.tensor(corners).float()))
        instances.gt_classes = torch.tensor([0, 2])
        batch.append({"image": image, "instances": instances})
    return batch


@pytest.mark.slow
def test_a_tiny_model_learns_to_find_two_rectangles(make_dino):
    model, batch = make_dino(), squares()
    groups = parameter_groups(model, lr=1e-3, backbone_multiplier=1.0)
    optimizer = ClippedAdamW(groups, max_norm=1.0)
    history = []
    for _ in range(200):
        losses = model(batch)
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
        history.append(sum(losses[f"loss_{kind}"].item() for kind in ("class", "bbox", "giou")))
    assert history[-1] < history[0] / 4
    for x, (boxes, scores, classes) in zip(batch, detect(model, batch), strict=True):
        truth = x["instances"]
        assert sorted(classes[:2].tolist()) == truth.gt_classes.tolist()
        assert scores[1] > 0.5 > scores[2]
        iou = pairwise_iou(Boxes(boxes[:2][classes[:2].argsort()]), truth.gt_boxes)
        assert iou.diagonal().min() > 0.7
