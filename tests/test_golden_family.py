"""DINO's predecessors: with their authors' weights, the same images give the same tensors.

As in `test_golden.py`, the official implementations were recorded, in float64 throughout, and a
rule fills each weight from its name. What is left is the rounding of what is stored, in float32.
"""

import json
import runpy
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from detectron2.config import instantiate
from test_golden import LAYERS, best_logit, to_slots, watched
from torch import Tensor

from dino_d2.layouts import detr
from dino_d2.modeling.branches import group_attn_mask, join_groups
from dino_d2.modeling.criterion import AllProposals
from dino_d2.modeling.postprocess import to_instances
from dino_d2.structures import (
    Branch,
    DetectorOutput,
    FeaturePyramid,
    LayerOutput,
    Target,
    stack_predictions,
)
from dino_d2.weights import model_zoo

GOLDEN = Path(__file__).parents[2] / "shared" / "golden_family"
NUM_CLASSES = 91
COUNTS = {"": [3, 7], "one_empty/": [0, 7], "all_empty/": [0, 0]}  # boxes of the two images
FLIPPED = 0.2  # of the labels are drawn anew
TOLERANCE = 1e-6  # of logits, boxes and scores, absolute; of losses, relative


class Official(NamedTuple):
    config: str
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]


MODELS = {
    "detr": Official("detr_R_50_500ep", detr.from_detr),
    "dab_detr": Official("dab_detr_R_50_50ep", detr.from_dab_detr),
    "dn_detr": Official("dn_detr_R_50_50ep", detr.from_dab_detr),
    "deformable_detr": Official("deformable_detr_R_50_50ep", detr.from_deformable_detr),
    "deformable_detr_refine": Official(
        "deformable_detr_R_50_refine_50ep", detr.from_deformable_detr
    ),
    "deformable_detr_two_stage": Official(
        "deformable_detr_R_50_two_stage_50ep", detr.from_deformable_detr
    ),
    "dab_deformable_detr": Official("dab_deformable_detr_R_50_50ep", detr.from_deformable_detr),
    "dn_deformable_detr": Official("dn_deformable_detr_R_50_50ep", detr.from_deformable_detr),
}

pytestmark = [
    pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"there is no {GOLDEN}"),
    pytest.mark.slow,
]


# ---- what was recorded


@pytest.fixture(scope="module")
def rule():
    return SimpleNamespace(**runpy.run_path(str(GOLDEN / "fill_predecessors.py")))


# These have the parts of the others, but for what little `test_predecessors.py` sees.
SOME = ("detr", "dn_detr", "dn_deformable_detr")
PARAMS = [x if x in SOME else pytest.param(x, marks=pytest.mark.nightly) for x in MODELS]


@pytest.fixture(scope="module", params=PARAMS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def keys(name):
    return json.loads((GOLDEN / f"{name}_keys.json").read_text())


@pytest.fixture(scope="module")
def recorded(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def official_state(rule, keys):
    fill = {}
    for x in keys["keys"]:
        same = fill.get(x["alias_of"])
        fill[x["key"]] = (
            rule.fill(x["key"], x["shape"], head=keys["head"]) if same is None else same
        )
    return fill


# ---- our runs


class Case(NamedTuple):
    """A training step. Its result is that of an evaluation: there is no dropout."""

    output: DetectorOutput
    layers: list[LayerOutput]  # of all queries, those of denoising first
    references: list[Tensor]  # that each layer started from, likewise
    noised: Branch | None  # before decoding
    targets: list[Target]
    losses: dict[str, Tensor]
    grads: dict[str, Tensor]  # by our names
    memory_grad: Tensor


class Runs(NamedTuple):
    model: torch.nn.Module
    features: dict[str, Tensor]
    levels: list[Tensor]
    memory: FeaturePyramid
    sizes: list[tuple[int, int]]
    cases: dict[str, Case]


@pytest.fixture(scope="module")
def runs(name, rule, keys, recorded, official_state):
    cfg = model_zoo.get_config(f"Predecessors/{MODELS[name].config}.py").model
    cfg.num_classes, cfg.encoder.dropout = NUM_CLASSES, 0.0
    model = instantiate(cfg)
    model.load_state_dict(MODELS[name].convert(official_state), strict=True)
    model = model.double().train()
    images = rule.images(tuple(keys["image_seeds"]))
    pixels, padding = rule.pad(images)
    padding = padding.bool()
    # Gradients go back as far as they were recorded: to the encoder's output, to the backbone's, or
    # to the first layer.
    first = {x["key"]: x["grad_index"] for x in keys["keys"]}
    with torch.set_grad_enabled("grad_norm/memory" not in recorded):
        features = model.backbone(pixels.double())
        inputs = {key: x.detach().requires_grad_(x.requires_grad) for key, x in features.items()}
        levels = model.neck(inputs)
        memory = model.encoder(levels, padding)
    cases = {}
    for case in COUNTS:
        norms = recorded[f"{case}grad_norms"]
        has_encoder = norms[first["transformer.encoder.layers.0.linear1.weight"]] >= 0
        run = train(model, pixels, padding, memory, recorded, case, has_encoder)
        if not case and has_encoder:
            grads = [x.grad for x in inputs.values()]
            torch.autograd.backward(list(features.values()), grads)
        grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        cases[case] = run._replace(grads=grads)
    return Runs(model, features, levels, memory, [tuple(x.shape[1:]) for x in images], cases)


def train(model, pixels, padding, memory, recorded, case, has_encoder):
    """From the memory on."""
    parts = [[recorded[f"{case}input/target{i}/{x}"] for x in ("labels", "boxes")] for i in (0, 1)]
    targets = [Target(labels, boxes.double()) for labels, boxes in parts]
    tokens = memory.tokens.detach().requires_grad_()
    seen = {"decoder": model.decoder}
    if model.denoising is not None:
        seen["denoising"] = model.denoising
    references = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: references.append(args[2].detach()))
        for layer in model.decoder.layers
    ]
    with pytest.MonkeyPatch.context() as patch, watched(seen) as made, drawn(recorded, case):
        for stage in (model.backbone, model.neck):
            patch.setattr(stage, "forward", lambda x: x)
        patch.setattr(model.encoder, "forward", lambda *_: memory._replace(tokens=tokens))
        output = model.detect(pixels, padding, targets)
    for hook in hooks:
        hook.remove()
    losses = model.criterion(output, targets)
    model.zero_grad()
    sum(losses.values()).backward()
    if has_encoder:
        memory.tokens.backward(tokens.grad, retain_graph=True)
    noised = made["denoising"][0] if "denoising" in made else None
    layers = made["decoder"][0]
    return Case(output, layers, references, noised, targets, losses, {}, tokens.grad)


@contextmanager
def drawn(recorded, case):
    """Has torch draw what the official noise was made of."""
    if f"{case}dn/draw_box" not in recorded or not any(COUNTS[case]):
        yield
        return
    flip, new, box = (recorded[f"{case}dn/draw_{x}"] for x in ("label_flip", "label_new", "box"))
    labels = torch.zeros(len(flip), dtype=torch.int64)
    labels[flip < FLIPPED] = new.long()

    def slots(values, shape, empty=0):
        return to_slots(values, COUNTS[case], empty).view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda shape, **_: slots(flip, shape, empty=1))
        patch.setattr(torch, "randint_like", lambda x, _: slots(labels, x.shape))
        patch.setattr(torch, "rand_like", lambda x: slots(box, x.shape).to(x))
        yield


@pytest.fixture(params=COUNTS, ids=lambda case: case.strip("/") or "boxes")
def case(request):
    return request.param


# ---- comparing


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual.detach().double(), expected.double(), atol=tolerance, rtol=0)


def assert_best(logits, recorded, prefix):
    """The recorded best label of each query is ours."""
    assert_close(best_logit(logits), recorded[f"{prefix}best_logit"])
    assert torch.equal(logits.argmax(-1), recorded[f"{prefix}best_label"].long())


def moments(x: Tensor) -> Tensor:
    return torch.stack([x.flatten(1).mean(1), x.flatten(1).std(1)], 1)


def official_name(loss: str) -> str:
    loss = loss.replace("loss_class", "loss_ce")
    if "_dn" in loss:
        return "tgt_" + loss.replace("_dn", "")
    return loss


# ---- weights


def test_the_weights_are_those_that_were_recorded(rule, keys, official_state):
    for x in keys["keys"]:
        expected = pytest.approx(x["sum_sumsq"], rel=1e-9, abs=1e-6)
        assert rule.checksum(official_state[x["key"]]) == expected, x["key"]


# ---- evaluation


def test_every_stage_is_the_official_one(runs, recorded):
    main = runs.cases[""]
    queries = recorded["pred_logits"].shape[1]
    features = torch.stack([x.features for x in main.layers])[:, :, -queries:]
    stages = {"backbone": runs.features.values(), "input_proj": runs.levels, "hs": features}
    for name, parts in stages.items():
        ours = torch.stack([moments(x) for x in parts])
        assert_close(ours, recorded[f"stats/{name}"])
    step = next(x for x in (5, 50) if f"memory[:, ::{x}]" in recorded)
    assert_close(runs.memory.tokens[:, ::step], recorded[f"memory[:, ::{step}]"])
    assert_close(features[:, :, ::50], recorded["hs[:, :, ::50]"])
    if "references" in recorded:
        assert_close(torch.stack(main.references)[:, :, -queries:], recorded["references"])


def test_predictions_of_every_layer_are_the_official_ones(runs, recorded, case):
    *others, last = runs.cases[case].output.result.layers
    assert_close(last.logits, recorded["pred_logits"])
    assert_close(last.boxes, recorded["pred_boxes"])
    assert len(others) == 5
    for i, layer in enumerate(others):
        assert_best(layer.logits, recorded, f"aux{i}/")
        assert_close(layer.boxes, recorded[f"aux{i}/pred_boxes"])


def test_proposals_are_the_official_ones(runs, recorded):
    proposals = runs.cases[""].output.result.proposals
    if "proposal_scores" not in recorded:
        assert proposals is None
        return
    assert_close(proposals.logits[..., 0], recorded["proposal_scores"])
    assert_best(proposals.logits, recorded, "enc/")
    assert_close(proposals.boxes, recorded["enc/pred_boxes"])
    selected = runs.model.query_selection.best(proposals.logits[..., 0])
    assert torch.equal(selected, recorded["topk_proposals"].long())


def test_detections_are_the_official_ones(runs, recorded):
    found = runs.model.best(runs.cases[""].output.result.layers[-1])
    for i, ours in enumerate(to_instances(found, runs.sizes)):
        # DETR's are in the order of its queries
        scores, order = recorded["detections/scores"][i].sort(descending=True, stable=True)
        assert_close(ours.scores, scores)
        assert torch.equal(ours.pred_classes, recorded["detections/labels"][i][order].long())
        size = torch.tensor(runs.sizes[i]).flip(0).tile(2)
        boxes = recorded["detections/boxes"][i][order] / size
        assert_close(ours.pred_boxes.tensor / size, boxes)


# ---- denoising


def test_noise_is_the_official_one(name, runs, recorded, case):
    noised, counts = runs.cases[case].noised, COUNTS[case]
    assert (noised is not None) == name.startswith("dn_")
    if noised is None or not any(counts):
        return
    assert noised.repeats == recorded[f"{case}dn/groups"]
    assert len(noised.groups) == recorded[f"{case}dn/pad_size"]
    reference = recorded[f"{case}dn/query_bbox"].double().sigmoid()
    assert_close(noised.queries.reference, reference)
    if f"{case}dn/query_label" in recorded:
        assert_close(noised.queries.content, recorded[f"{case}dn/query_label"])
    mask = group_attn_mask(join_groups([noised.groups], recorded["pred_logits"].shape[1]))
    row = recorded[f"{case}dn/attn_mask_row_of_query"]
    assert torch.equal(mask, recorded[f"{case}dn/attn_mask_rows"][row].bool())
    for layer, suffix in zip(runs.cases[case].output.named("dn").layers, LAYERS, strict=True):
        prefix = f"{case}dn/" if suffix == "last" else f"{case}dn/{suffix}/"
        assert_close(layer.boxes, recorded[f"{prefix}pred_boxes"])
        if f"{prefix}best_logit" in recorded:
            assert_best(layer.logits, recorded, prefix)


# ---- training


def test_boxes_are_matched_as_the_official_ones(runs, recorded, case):
    run, counts = runs.cases[case], COUNTS[case]
    stages = [(LAYERS, run.output.result.layers, run.targets)]
    if isinstance(runs.model.criterion, AllProposals):
        objects = [x._replace(labels=torch.zeros_like(x.labels)) for x in run.targets]
        stages.append((["enc"], [run.output.result.proposals], objects))
    for names, layers, targets in stages:
        images, queries, boxes = runs.model.criterion.matcher(stack_predictions(layers), targets)
        for stage, (query, box) in enumerate(zip(queries, boxes, strict=True)):
            for image, first in enumerate((0, counts[0])):  # ours count through the batch
                pairs = torch.stack([query, box - first], 1)[images == image]
                expected = recorded[f"{case}match/{names[stage]}/{image}"].T.tolist()
                assert sorted(pairs.tolist()) == sorted(expected), names[stage]


def test_losses_are_the_official_ones(runs, recorded, case):
    losses = runs.cases[case].losses
    given = {key.removeprefix(f"{case}loss/") for key in recorded if f"{case}loss/" in key}
    weighted = {key.removeprefix("weight/") for key in recorded if key.startswith("weight/")}
    assert {official_name(name) for name in losses} == given & weighted
    for name, loss in losses.items():
        key = official_name(name)
        expected = (recorded[f"{case}loss/{key}"] * recorded[f"weight/{key}"]).item()
        assert loss.item() == pytest.approx(expected, rel=TOLERANCE, abs=1e-12), name
    total = recorded[f"{case}total"].item()
    assert sum(losses.values()).item() == pytest.approx(total, rel=TOLERANCE)


def test_gradients_are_the_official_ones(name, runs, keys, recorded, case):
    run = runs.cases[case]
    ours = official_grads(MODELS[name].convert, keys, run.grads)
    norms = recorded[f"{case}grad_norms"]
    compared = 0
    for x in keys["keys"]:
        if not x["trained"] or x["alias_of"] or norms[x["grad_index"]] < 0:
            continue
        expected = pytest.approx(norms[x["grad_index"]].item(), rel=1e-5, abs=1e-9)
        assert ours[x["key"]].norm().item() == expected, x["key"]
        compared += 1
    assert compared > 140
    prefix = f"{case}grad/"
    for key in [key for key in recorded if key.startswith(prefix)]:
        key = key.removeprefix(prefix)
        expected = recorded[prefix + key].double()
        actual = run.memory_grad[:, ::50] if key.startswith("memory") else ours[key]
        assert (actual - expected).norm() <= 1e-5 * expected.norm(), key
    if f"{case}grad_norm/memory" in recorded:
        expected = recorded[f"{case}grad_norm/memory"].item()
        assert run.memory_grad.norm().item() == pytest.approx(expected, rel=1e-5)


def official_grads(convert, keys, grads):
    """By their names. Numbers of elements, converted like weights, tell where each of ours is."""
    numbers, end = {}, 1  # 0 is what ours adds
    for x in keys["keys"]:
        count = torch.Size(x["shape"]).numel()
        if x["alias_of"]:
            numbers[x["key"]] = numbers[x["alias_of"]]
        else:
            numbers[x["key"]] = torch.arange(end, end + count).view(x["shape"])
            end += count
    flat = torch.zeros(end, dtype=torch.float64)
    for name, places in convert(numbers).items():
        if name in grads:
            flat.index_add_(0, places.flatten(), grads[name].flatten())
    return {key: flat[places] for key, places in numbers.items()}
