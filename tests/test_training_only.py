"""What supervises a training, and nothing else: every part of the registries, alike."""

import copy
import logging

import pytest
import torch
from detectron2.modeling import build_model
from outputs import run_detector

from dino_d2.engine.ema import EMA
from dino_d2.export.graph import Exportable
from dino_d2.layouts.dino import to_official
from dino_d2.modeling import BRANCH_REGISTRY, PASS_REGISTRY, StaticQueries
from dino_d2.modeling.auxiliary import Levels, image_sizes, to_instances
from dino_d2.modeling.passes import Instruction
from dino_d2.names import plural
from dino_d2.structures import Target
from dino_d2.trace import trace
from dino_d2.weights import model_zoo
from dino_d2.weights.checkpointer import Checkpointer

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of Detectron2's anchors

SIZES = {"num_classes": 3, "embed_dim": 64}
OPTIONS = {
    "OneToManyHead": SIZES,
    "OneToManyQueries": SIZES | {"num_queries": 30},
    "DenseQueries": SIZES | {"num_queries": 30},
    "AuxiliaryFCOS": SIZES,
    "AuxiliaryFasterRCNN": SIZES | {"fc_dim": 32},
    "SeparatePass": {"num_layers": 2, "embed_dim": 64, "ffn_dim": 32},
    "InstructedPass": SIZES | {"num_layers": 2},
}
PARTS = [name for registry in (BRANCH_REGISTRY, PASS_REGISTRY) for name, _ in registry]
EVERY = pytest.mark.parametrize("name", PARTS)


def add(model, name):
    is_pass = name in PASS_REGISTRY
    kind = (PASS_REGISTRY if is_pass else BRANCH_REGISTRY).get(name)
    (model.passes if is_pass else model.branches).append(kind(**OPTIONS[name]))
    return model


@EVERY
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [(2, 3), (0, 1), (0, 0), (25, 1)], ids=str)
def test_every_parameter_learns(make_dino, make_batch, name, counts, precision):
    model = add(make_dino(), name).train()
    model.decoder.recompute = counts == (2, 3)
    batch = make_batch(*counts, sizes=[(64, 64), (48, 80)])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        losses = model(batch)
    assert all(x.isfinite() and x.shape == () for x in losses.values())
    sum(losses.values()).backward()
    missing = [n for n, x in model.named_parameters() if x.requires_grad and x.grad is None]
    assert not missing
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.requires_grad)
    moved = [x.grad.any() for part in (model.branches, model.passes) for x in part.parameters()]
    assert any(moved)


@EVERY
def test_the_result_and_its_losses_do_not_know_of_it(make_dino, make_batch, randomise, name):
    plain = randomise(make_dino(), std=0.1)
    model = add(copy.deepcopy(plain), name)
    batch = make_batch(2, 3)
    losses = []
    for x in (plain, model):
        torch.manual_seed(1)
        x.denoising.noise_boxes = lambda boxes, copy: boxes  # nothing is drawn
        x.denoising.label_noise = 0.0
        losses.append(x.train()(batch))
    given, found = losses
    assert found.keys() > given.keys()
    for key, loss in given.items():
        torch.testing.assert_close(found[key], loss, rtol=1e-4, atol=1e-5)
    images = plain.preprocess_images(batch)
    with torch.no_grad():
        (alone,), (together,) = (run_detector(x.eval(), images).branches for x in (plain, model))
    for a, b in zip(alone.layers, together.layers, strict=True):
        assert torch.equal(a.logits, b.logits) and torch.equal(a.boxes, b.boxes)


@EVERY
@pytest.mark.parametrize("broken", ["weights", "boxes"])
def test_what_is_not_finite_breaks_the_loss_and_nothing_else(make_dino, make_batch, name, broken):
    model, batch = add(make_dino(), name).train(), make_batch(3, 2)
    if broken == "weights":
        torch.nn.init.constant_(model.encoder.level_embed.weight, torch.nan)
    else:
        batch[1]["instances"].gt_boxes.tensor[0, 2] = torch.nan
    losses = model(batch)
    assert not sum(losses.values()).isfinite()
    sum(losses.values()).backward()
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad)


def test_what_is_seen_inside_is_the_same_with_all_of_it(make_dino, make_batch):
    plain = make_dino().eval()
    model = copy.deepcopy(plain)
    for name in PARTS:
        add(model, name).eval()
    batch = make_batch(2, 1)
    images, targets = model.preprocess_images(batch), model.prepare_targets(batch)
    alone, together = (trace(x, images, targets) for x in (plain, model))
    torch.testing.assert_close(together.selection._asdict(), alone.selection._asdict())
    for a, b in zip(alone.layers, together.layers, strict=True):
        torch.testing.assert_close(b._asdict(), a._asdict())


def test_an_exported_file_has_nothing_that_only_training_needs(make_dino):
    plain = make_dino().eval()
    model = copy.deepcopy(plain)
    for name in PARTS:
        add(model, name).eval()
    given = Exportable(model).state_dict()
    expected = {f"model.{k}" for k in plain.state_dict() if not k.startswith("denoising.")}
    assert given.keys() == expected
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]])
    with torch.no_grad():
        for a, b in zip(Exportable(model)(*images), Exportable(plain)(*images), strict=True):
            assert torch.equal(a, b)
    assert len(model.branches) == 5 and model.denoising is not None  # it is only shared


# ---- checkpoints


@pytest.fixture
def messages(caplog, monkeypatch):
    """What is said while weights are loaded, with its level; a function."""
    for name in ("dino_d2", "detectron2", "fvcore"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: [(x.levelname, x.getMessage()) for x in caplog.get_records("call")]


def load(model, state, tmp_path):
    path = str(tmp_path / "weights.pth")
    checkpoint = {"model": state, "dino_d2": model.settings() | {"classes": ["a", "b", "c"]}}
    torch.save(checkpoint, path)
    return Checkpointer(model, classes=["a", "b", "c"], complete=True).load(path)


@EVERY
def test_weights_without_it_are_complete(make_dino, randomise, tmp_path, messages, name):
    plain, model = randomise(make_dino()), add(make_dino(), name)
    load(model, plain.state_dict(), tmp_path)
    state = model.state_dict()
    assert all(torch.equal(state[key], x) for key, x in plain.state_dict().items())
    assert [text for level, text in messages() if level == "WARNING"] == []


@EVERY
def test_weights_with_it_serve_a_model_without(make_dino, randomise, tmp_path, messages, name):
    model, plain = add(randomise(make_dino()), name), make_dino()
    load(plain, model.state_dict(), tmp_path)
    state = plain.state_dict()
    assert all(torch.equal(model.state_dict()[key], x) for key, x in state.items())
    assert [text for level, text in messages() if level == "WARNING"] == []
    number = len(model.state_dict()) - len(state)
    said = [text for _, text in messages() if "for training only" in text]
    assert len(said) == 1 and said[0].startswith(plural(number, "tensor"))


@EVERY
def test_weights_are_saved_and_loaded_with_it(make_dino, randomise, tmp_path, name):
    trained, model = randomise(add(make_dino(), name)), add(make_dino(), name)
    load(model, trained.state_dict(), tmp_path)
    assert model.state_dict().keys() == trained.state_dict().keys()
    torch.testing.assert_close(model.state_dict(), trained.state_dict())


def test_averaged_weights_without_it_are_evaluated(make_dino, randomise, tmp_path):
    plain, model = randomise(make_dino()), add(make_dino(), "OneToManyHead")
    saved = EMA(plain, 0.9)
    saved.update()
    Checkpointer(plain, str(tmp_path), ema=saved).save("model")
    average = EMA(model, 0.9)
    Checkpointer(model, complete=True, ema=average).load(str(tmp_path / "model.pth"))
    assert all(torch.equal(average.weights[key], x) for key, x in saved.weights.items())


def test_class_heads_keep_the_rows_of_classes_of_the_same_name(make_dino, randomise, tmp_path):
    trained = randomise(add(add(make_dino(), "OneToManyHead"), "InstructedPass"))
    model, path = copy.deepcopy(randomise(trained)), str(tmp_path / "model.pth")
    Checkpointer(trained, str(tmp_path), classes=["a", "b", "c"]).save("model")
    Checkpointer(model, classes=["c", "a", "b"]).load(path)
    for part, of_trained in zip(
        (*model.branches, *model.passes), (*trained.branches, *trained.passes), strict=True
    ):
        assert torch.equal(part.class_head.weight, of_trained.class_head.weight[[2, 0, 1]])


def test_official_weights_are_without_it(make_dino):
    model = make_dino()
    state = to_official(model.state_dict())
    assert to_official(add(model, "OneToManyHead").state_dict()).keys() == state.keys()


# ---- each of its own


@pytest.mark.parametrize(
    ("key", "name", "nearest"),
    [("BRANCHES", "OneToManyHeads", "OneToManyHead"), ("PASSES", "Separate", "SeparatePass")],
)
def test_an_unknown_part_is_answered_with_the_nearest(key, name, nearest):
    cfg = model_zoo.get_config("quickstart")
    cfg.MODEL.DINO[key], cfg.MODEL.DEVICE = [name], "meta"
    message = f"MODEL.DINO.{key} is '{name}', which is unknown; did you mean: {nearest}"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_a_pass_is_for_a_number_of_layers_and_for_proposals(make_dino, make_batch):
    model = add(make_dino(num_layers=3), "SeparatePass")
    with pytest.raises(ValueError, match="decoder of 2 layers, but the model's has 3"):
        model(make_batch(1))
    model = add(make_dino(StaticQueries), "InstructedPass")
    with pytest.raises(ValueError, match="proposals, which StaticQueries does not have"):
        model(make_batch(1))


def test_only_the_matching_queries_see_the_tokens(make_dino):
    """Against self-attention with every token and query spelled out."""
    layer = make_dino().decoder.layers[0]
    instruction = Instruction(3, 64)
    x, position, noised = torch.randn(2, 9, 64), torch.randn(2, 9, 64), 4
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[noised:, :noised] = True
    found = instruction(9 - noised, layer, x, position, mask)
    tokens = [y.weight.expand(2, -1, -1) for y in (instruction.content, instruction.position)]
    for rows, seen in ((slice(noised), x), (slice(noised, 9), torch.cat([tokens[0], x[:, 4:]], 1))):
        where = position if seen is x else torch.cat([tokens[1], position[:, noised:]], 1)
        q, keys = (x + position)[:, rows], seen + where
        attention = torch.nn.MultiheadAttention.forward(layer.self_attn, q, keys, seen)
        y = x[:, rows] + attention[0]
        torch.testing.assert_close(found[:, rows], instruction.norm(y), rtol=1e-4, atol=1e-5)
    of_heads = mask.expand(2 * layer.self_attn.num_heads, 9, 9)  # as those of relations
    bias = torch.zeros_like(of_heads, dtype=torch.float32).masked_fill(of_heads, -torch.inf)
    for same in (of_heads, bias):
        again = instruction(9 - noised, layer, x, position, same)
        torch.testing.assert_close(again, found)


def test_a_separate_pass_of_the_decoders_own_parts_is_the_first_one_again(make_dino, make_batch):
    model = add(make_dino(), "SeparatePass").eval()
    model.passes[0].parts = torch.nn.ModuleList(x.ffn for x in model.decoder.layers)
    batch = make_batch(2, 1)
    images, targets = model.preprocess_images(batch), model.prepare_targets(batch)
    output = run_detector(model, images, targets)
    for first, second in (("", "separate"), ("dn", "separate_dn")):
        pair = zip(output.named(first).layers, output.named(second).layers, strict=True)
        for a, b in pair:
            torch.testing.assert_close(a, b)
    losses = model.criterion(output, targets)
    assert losses["loss_giou_separate_dn"] == losses["loss_giou_dn"]


def test_auxiliary_boxes_and_maps_are_where_the_image_is(make_memory):
    # Of 48 x 40 pixels the second image has the upper left 24 x 32: 3 x 4 of 6 x 5 tokens.
    padding = torch.zeros(2, 48, 40, dtype=torch.bool)
    padding[1, 24:] = padding[1, :, 32:] = True
    memory = make_memory(padding=padding)
    assert image_sizes(memory) == [(48, 40), (24, 32)]
    fine, coarse = Levels(embed_dim=32, num_levels=2)(memory).values()
    assert fine.shape == (2, 32, 6, 5) and coarse.shape == (2, 32, 3, 3)
    assert torch.equal(fine[0, :, 2, 3], memory.tokens[0, 2 * 5 + 3])
    assert not fine[1, :, 3:].any() and not fine[1, :, :, 4:].any() and fine[1, :, :3, :4].all()
    boxes = [[0.5, 0.5, 0.5, 1.0], [0.5, 0.5, 0.0, 1.0], [torch.nan, 0.5, 0.1, 0.1]]
    instances = to_instances(Target(torch.tensor([2, 1, 0]), torch.tensor(boxes)), (24, 32))
    assert instances.gt_boxes.tensor.tolist() == [[8.0, 0.0, 24.0, 24.0]]
    assert instances.gt_classes.tolist() == [2]
