"""Mask DINO: with its authors' weights, the same images give the same tensors.

As in `test_golden_family.py`, the official implementation was recorded in float64, and a rule fills
each weight from its name. Its images are given padded to one size, as it has no padding mask.
"""

import json
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import ImageList
from test_golden import to_slots
from test_golden_family import GOLDEN as FAMILY
from test_golden_family import assert_best, assert_close, official_grads

from dino_d2.data.coco_classes import COCO_80
from dino_d2.layouts.dino import detect_format
from dino_d2.layouts.maskdino import from_maskdino, to_maskdino
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.modeling import mask_loss
from dino_d2.modeling.branches import group_attn_mask, join_groups
from dino_d2.modeling.masks import mask_logits
from dino_d2.structures import MaskTarget, stack_predictions
from dino_d2.weights import model_zoo
from dino_d2.weights.checkpointer import Checkpointer

GOLDEN = FAMILY.parent / "golden_mask"
CONFIGS = {
    "maskdino_r50": "maskdino_R_50_50ep",
    "maskdino_r50_4scale": "maskdino_R_50_4scale_50ep",
}
COUNTS = {"": [3, 7], "one_empty/": [0, 7], "all_empty/": [0, 0]}  # objects of the two images
SIZE = 256, 416
STAGES = [f"aux{i}" for i in range(9)] + ["last"]
NIGHTLY = [x if not x else pytest.param(x, marks=pytest.mark.nightly) for x in COUNTS]

pytestmark = [
    pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"there is no {GOLDEN}"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def rule():
    folders = [str(GOLDEN), str(GOLDEN.parent / "golden")]
    sys.path[:0] = folders
    try:
        import fill
        import fill_mask
    finally:
        del sys.path[: len(folders)]
    return SimpleNamespace(images=fill.images, **vars(fill_mask))


class Official(NamedTuple):
    name: str
    keys: dict
    state: dict[str, torch.Tensor]


def official(rule, name):
    keys, state = json.loads((GOLDEN / f"{name}_keys.json").read_text()), {}
    for x in keys["keys"]:
        same = state.get(x["alias_of"])
        value = rule.fill(x["key"], x["shape"], head=keys["head"]) if same is None else same
        state[x["key"]] = value
    return Official(name, keys, state)


def build(given, training=False):
    cfg = model_zoo.get_config(f"MaskDINO/{CONFIGS[given.name]}.py").model
    cfg.num_classes = 80
    model = instantiate(cfg)
    model.load_state_dict(from_maskdino(given.state), strict=True)
    return model.double().train(training)


def padded_images(rule, keys):
    pixels = torch.zeros(2, 3, *SIZE, dtype=torch.float64)
    for image, row in zip(rule.images(tuple(keys["image_seeds"])), pixels, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return pixels, torch.zeros(2, *SIZE, dtype=torch.bool)


@pytest.fixture(scope="module")
def given(rule):
    return official(rule, "maskdino_r50")


@pytest.fixture(scope="module")
def evaluated():
    return torch.load(GOLDEN / "maskdino_r50_eval.pt", weights_only=True)


@pytest.fixture(scope="module")
def recorded():
    return torch.load(GOLDEN / "maskdino_r50_train.pt", weights_only=True)


class Run(NamedTuple):
    model: torch.nn.Module
    output: tuple
    targets: list[MaskTarget]
    losses: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=NIGHTLY, ids=lambda x: x.strip("/") or "boxes")
def case(request):
    return request.param


@pytest.fixture(scope="module")
def run(rule, given, recorded, case):
    """A training step, without gradients. Its result is that of an evaluation."""
    return train(rule, given, recorded, case, gradients=False)


def train(rule, given, recorded, case, gradients):
    model, counts = build(given, training=True), COUNTS[case]
    images, targets = padded_images(rule, given.keys), []
    for i, count in enumerate(counts):
        parts = {x: recorded[f"input/target{i}/{x}"][:count] for x in ("labels", "boxes")}
        packed = recorded[f"input/target{i}/masks_packed"][:count].numpy()
        masks = torch.from_numpy(np.unpackbits(packed, axis=-1)[..., : SIZE[1]]).bool()
        known = torch.ones(count, dtype=torch.bool)
        boxes = parts["boxes"].double()
        targets.append(MaskTarget(parts["labels"].long(), boxes, masks, known, known))
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(gradients):
        draw_as_official(patch, rule, recorded, case)
        output = model.detect(*images, targets)
        losses = model.criterion(output, targets)
        if gradients:
            sum(losses.values()).backward()
    return Run(model, output, targets, losses)


def draw_as_official(patch, rule, recorded, case):
    names = {12544: "points/match", 37632: "points/oversampled", 3136: "points/rest"}
    tables = {count: rule.draw(name, count, 2) for count, name in names.items()}
    patch.setattr(
        mask_loss, "draw_points", lambda n, count, like: tables[count].to(like).expand(n, -1, -1)
    )
    counts = COUNTS[case]
    if not any(counts):
        return
    number = int(recorded[f"{case}dn/groups"]) * sum(counts)
    flip = rule.draw("dn/label", number)
    new = (80 * rule.draw("dn/new_label", int((flip < 0.2).sum()))).long()
    labels = torch.zeros(number, dtype=torch.int64)
    labels[flip < 0.2] = new
    box = rule.draw("dn/box", number, 4)

    def slots(values, shape, empty=0):
        return to_slots(values, counts, empty).view(shape)

    patch.setattr(torch, "rand", lambda shape, **_: slots(flip, shape, empty=1))
    patch.setattr(torch, "randint_like", lambda x, _: slots(labels, x.shape))
    patch.setattr(torch, "rand_like", lambda x: slots(box, x.shape).to(x))


def statistics(masks):
    x = masks.flatten(2)
    numbers = x.mean(2), x.std(2), x.amin(2), x.amax(2), (x > 0).sum(2)
    return torch.stack(numbers, -1)


# ---- weights


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_recognised_and_come_back(rule, name):
    _, keys, state = official(rule, name)
    assert detect_format(state) == "maskdino"
    ours = from_maskdino(state)
    again = to_maskdino(ours, coarsest_first=name == "maskdino_r50")
    assert again.keys() | {"criterion.empty_weight"} == state.keys()
    assert all(torch.equal(x, state[key]) for key, x in again.items())


# ---- evaluation


def test_every_stage_is_the_official_one(run, evaluated):
    *_, maps = run.output.result.layers[-1], run.output.pixels.maps
    assert_close(maps[:, :, ::8, ::8], evaluated["mask_features_every8"])
    moments = torch.stack([maps.flatten(2).mean(2), maps.flatten(2).std(2)], -1)
    assert_close(moments, evaluated["mask_features_mean_std"])


def test_proposals_are_the_official_ones(run, evaluated):
    proposals = run.output.result.proposals
    assert_best(proposals.logits, evaluated, "interm/")
    assert_close(proposals.boxes, evaluated["interm/pred_boxes"])
    masks = mask_logits(proposals.masks, run.output.pixels.maps)
    assert_close(masks[:, :, ::16, ::16], evaluated["interm/pred_masks_every16"])
    assert_close(statistics(masks), evaluated["interm/pred_masks_stats"])
    assert torch.equal((masks > 0).flatten(2).sum(2) == 0, evaluated["empty_interm_masks"])
    start = run.output.result.queries.reference
    assert_close(start, evaluated["init_boxes/bitmask"].double().clamp(1e-5, 1 - 1e-5))


def test_predictions_of_every_layer_are_the_official_ones(run, evaluated):
    *others, last = run.output.result.layers
    assert_close(last.logits, evaluated["pred_logits"])
    assert_close(last.boxes, evaluated["pred_boxes"])
    masks = mask_logits(last.masks, run.output.pixels.maps)
    assert_close(masks[:, :, ::8, ::8], evaluated["pred_masks_every8"], 2e-6)
    assert_close(statistics(masks), evaluated["pred_masks_stats"], 2e-6)
    assert len(others) == 9
    for i, layer in enumerate(others):
        assert_best(layer.logits, evaluated, f"aux{i}/")
        assert_close(layer.boxes, evaluated[f"aux{i}/pred_boxes"])


@pytest.mark.parametrize("prefix", ["detections", "detections_rescaled"])
def test_detections_are_the_official_ones(rule, given, run, evaluated, prefix):
    model, sizes = run.model, [tuple(x) for x in given.keys["sizes"]]
    found = model.best(run.output.result.layers[-1])
    images = ImageList(torch.zeros(2, 3, *SIZE), sizes)
    for i, instances in enumerate(model.to_instances(run.output, found, images)):
        theirs = {
            name.rsplit("/", 1)[1]: x
            for name, x in evaluated.items()
            if name.startswith(f"{prefix}/{i}/")
        }
        size = dict(zip(("height", "width"), theirs["image_size"].tolist(), strict=True))
        ours = model.rescale(instances, size)
        scores, order = theirs["scores"].sort(descending=True, stable=True)
        assert_close(ours.scores, scores)
        assert torch.equal(ours.pred_classes, theirs["labels"][order].long())
        assert torch.equal(ours.pred_masks.sum((1, 2)), theirs["mask_area"][order].long())
        # Theirs are relative to the padded image, and not clipped.
        padded = theirs["boxes"][order].double() * (
            torch.tensor(sizes[i]) / torch.tensor(SIZE)
        ).flip(0).tile(2)
        limit = torch.tensor([size["width"], size["height"]]).tile(2)
        assert_close(ours.pred_boxes.tensor / limit, (padded / limit).clamp(0, 1))


def segment(run, given, monkeypatch, size=None, **options):
    """The results of both images with other options of the model, in their own size by default."""
    sizes = [tuple(x) for x in given.keys["sizes"]]
    options = {"instance_on": False, "stuff_classes": frozenset(range(1, 80, 2))} | options
    for name, value in options.items():
        monkeypatch.setattr(run.model, name, value)
    inputs = [dict(zip(("height", "width"), size or own, strict=True)) for own in sizes]
    return run.model.results(run.output, ImageList(torch.zeros(2, 3, *SIZE), sizes), inputs)


def test_panoptic_segments_are_the_official_ones(given, run, evaluated, monkeypatch):
    options = {"panoptic_on": True, "object_mask_threshold": 0.4, "overlap_threshold": 0.2}
    for i, result in enumerate(segment(run, given, monkeypatch, **options)):
        ids, segments = result["panoptic_seg"]
        expected = evaluated[f"panoptic/{i}/segments"].tolist()
        ours = [[x["id"], x["category_id"], int(x["isthing"])] for x in segments]
        assert ours == expected and result.keys() == {"panoptic_seg"}
        assert ids.dtype == torch.int32
        assert torch.equal(ids[::2, ::2], evaluated[f"panoptic/{i}/seg_every2"].int())
        areas = ids.flatten().bincount(minlength=len(ours) + 1)[1:]
        assert torch.equal(areas, evaluated[f"panoptic/{i}/area"])


@pytest.mark.parametrize(("kind", "temperature"), [("semantic", 0.06), ("semantic_plain", None)])
def test_semantic_maps_are_the_official_ones(given, run, evaluated, monkeypatch, kind, temperature):
    options = {"semantic_on": True, "temperature": temperature}
    for i, result in enumerate(segment(run, given, monkeypatch, **options)):
        expected = evaluated[f"{kind}/{i}/every16"].double()  # up to 39, stored in float32
        torch.testing.assert_close(result["sem_seg"][:, ::16, ::16], expected, atol=1e-6, rtol=1e-7)
        if temperature:
            best = result["sem_seg"].argmax(0)[::4, ::4]
            assert torch.equal(best, evaluated[f"{kind}/{i}/argmax_every4"].long())


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["no", "mask2box"])
def test_other_anchors_are_the_official_ones(rule, given, evaluated, kind):
    model = build(given)
    model.query_selection.initialize_box_type = kind
    with torch.no_grad():
        output = model.detect(*padded_images(rule, given.keys))
    *_, last = output.result.layers
    assert_close(last.boxes, evaluated[f"{kind}/pred_boxes"])
    assert_best(last.logits, evaluated, f"{kind}/")
    for i in (0, 4):
        assert_close(output.result.layers[i].boxes, evaluated[f"{kind}/aux{i}/pred_boxes"])


@pytest.mark.nightly
def test_four_levels_in_the_other_order_are_the_official_ones(rule):
    given = official(rule, "maskdino_r50_4scale")
    theirs = torch.load(GOLDEN / "maskdino_r50_4scale_eval.pt", weights_only=True)
    model = build(given)
    with torch.no_grad():
        output = model.detect(*padded_images(rule, given.keys))
    *others, last = output.result.layers
    assert_close(last.boxes, theirs["pred_boxes"])
    assert_best(last.logits, theirs, "")
    assert_close(
        statistics(mask_logits(last.masks, output.pixels.maps)), theirs["pred_masks_stats"], 2e-6
    )
    for i, layer in enumerate(others):
        assert_best(layer.logits, theirs, f"aux{i}/")
        assert_close(layer.boxes, theirs[f"aux{i}/pred_boxes"])
    assert_best(output.result.proposals.logits, theirs, "interm/")
    assert_close(output.result.proposals.boxes, theirs["interm/pred_boxes"])


# ---- training


def test_denoising_is_the_official_one(run, recorded, case):
    noised, counts = run.output.named("dn"), COUNTS[case]
    if not any(counts):
        assert noised.weight == 0
        return
    assert noised.repeats == recorded[f"{case}dn/groups"]
    assert len(noised.groups) == recorded[f"{case}dn/pad_size"]
    filled = to_slots(torch.ones(noised.repeats * sum(counts)), counts, 0).bool()
    reference = recorded[f"{case}dn/query_bbox"].double().sigmoid()[filled]
    assert_close(noised.queries.reference[filled], reference)
    if f"{case}dn/attn_mask_rows" in recorded:
        mask = group_attn_mask(join_groups([noised.groups], 300))
        row = recorded[f"{case}dn/attn_mask_row_of_query"].long()
        assert torch.equal(mask, recorded[f"{case}dn/attn_mask_rows"][row].bool())
    assert_best(noised.layers[-1].logits, recorded, f"{case}dn/")


def test_objects_are_matched_as_the_official_ones(rule, run, recorded, case):
    counts, result = COUNTS[case], run.output.result
    criterion, pixels = run.model.criterion, run.output.pixels
    truth = [
        mask_loss.MaskTruth(*target, *own)
        for target, *own in zip(run.targets, *pixels, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        draw_as_official(patch, rule, recorded, "all_empty/")
        stages = stack_predictions([*result.layers, result.proposals])
        match = criterion.match(result._replace(name="x"), stages, truth)
    for stage, name in enumerate([*STAGES, "interm"]):
        for image, first in enumerate((0, counts[0])):  # ours count through the batch
            pairs = torch.stack([match.queries[stage], match.targets[stage] - first], 1)
            expected = recorded[f"{case}match/{name}/{image}"].T.tolist()
            assert sorted(pairs[match.images == image].tolist()) == sorted(expected), name


def test_losses_are_the_official_ones(run, recorded, case):
    compare_losses(run.losses, recorded, case)


def compare_losses(losses, recorded, case):
    assert len(losses) == 105
    for name, loss in losses.items():
        key = name.replace("loss_class", "loss_ce").replace("_enc", "_interm")
        expected = (recorded[f"{case}loss/{key}"] * recorded[f"weight/{key}"]).item()
        assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-12), name
    total = sum(losses.values()).item()
    assert total == pytest.approx(recorded[f"{case}total"].item(), rel=1e-6)


@pytest.mark.nightly
def test_gradients_are_the_official_ones(rule, given, recorded):
    model, _, _, losses = train(rule, given, recorded, "", gradients=True)
    compare_losses(losses, recorded, "")
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    ours = official_grads(from_maskdino, given.keys, grads)
    norms = {key: x for key, x in recorded.items() if key.startswith("grad_norm/")}
    assert len(norms) == 393
    for key, norm in norms.items():
        expected = pytest.approx(norm.item(), rel=1e-6)
        assert ours[key.removeprefix("grad_norm/")].norm().item() == expected, key
    for key in [key for key in recorded if key.startswith("grad/")]:
        expected = recorded[key].double()
        difference = ours[key.removeprefix("grad/")] - expected
        assert difference.norm() <= 1e-6 * expected.norm(), key


@pytest.mark.nightly
def test_published_files_load_with_the_settings_that_no_tensor_shows(rule, tmp_path, caplog):
    for name, other in (("maskdino_r50", []), ("maskdino_r50_4scale", [0.05, 0.1, 0.2, 0.4])):
        given, path = official(rule, name), tmp_path / f"{name}.pth"
        torch.save({"model": given.state}, path)
        model = build(given)
        Checkpointer(model, classes=COCO_80, complete=True).load(str(path))
        model.query_selection.anchor_sides = other or [0.4, 0.2, 0.1]
        with pytest.raises(CheckpointError, match="anchor_sides"):
            Checkpointer(model, classes=COCO_80, complete=True).load(str(path))
