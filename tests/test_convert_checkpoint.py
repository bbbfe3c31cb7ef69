"""The program `convert_checkpoint.py`: to our layout and back to the official one."""

import sys
from pathlib import Path

import layouts
import pytest
import torch

from dino_d2 import modeling
from dino_d2.data.coco_classes import COCO_80
from dino_d2.engine.ema import EMA
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.weights.checkpointer import Checkpointer
from dino_d2.weights.releases import RELEASES

sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "dino"))
import convert_checkpoint  # noqa: E402

# What tells DINO from Deformable DETR, in the names of mmdetection and the others.
FC, CONTENT = "memory_trans_fc.weight", "transformer.tgt_embed.weight"
LAYOUTS = {"official": layouts.official, "detrex": layouts.detrex, "mmdet": layouts.mmdet}


@pytest.fixture
def make_trained(make_dino, randomise):
    """For everybody's pixels, and without the biases that mmdetection has not."""

    def make(**options):
        model = randomise(make_dino(**options))
        for part in (*model.neck.projections, *model.neck.downsamples):
            part[0].bias.data.zero_()
        if model.denoising:
            model.denoising.label_embed.weight.data[-1] = 0
        model.pixel_mean.copy_(torch.tensor([123.675, 116.28, 103.53]).view(-1, 1, 1))
        model.pixel_std.copy_(torch.tensor([58.395, 57.12, 57.375]).view(-1, 1, 1))
        return model

    return make


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The program, in a folder of its own; what it complains about, if it does."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
        try:
            convert_checkpoint.main()
        except SystemExit as end:
            return str(end.code)
        return None

    return run


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert [key for key, x in expected.items() if not torch.equal(actual[key], x)] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_ours(make_trained, run, layout, capsys):
    trained, model = make_trained(shared_heads=False), make_trained(shared_heads=False)
    torch.save({"model": LAYOUTS[layout](trained.state_dict()), "epoch": 11}, "theirs.pth")
    assert run("theirs.pth", "ours.pth") is None
    state = load("ours.pth")["model"]
    assert_same(state, trained.state_dict())
    assert f"{len(state)} tensors are in 'ours.pth'" in capsys.readouterr().out
    Checkpointer(model, complete=True).load("ours.pth")
    assert_same(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize("shared_heads", [True, False])
def test_there_and_back_again_no_bit_of_the_official_layout_changes(
    make_trained, run, shared_heads
):
    given = layouts.official(make_trained(shared_heads=shared_heads).state_dict())
    torch.save({"model": given}, "theirs.pth")
    assert run("theirs.pth", "ours.pth") is None
    assert run("ours.pth", "back.pth", "--to", "official") is None
    given["label_enc.weight"][-1] = 0  # which is never looked up
    assert_same(load("back.pth")["model"], given)


def test_what_other_tools_wrap_around_weights_is_taken_off_and_said(make_trained, run, capsys):
    trained = make_trained()
    state = {f"net.{key}": x for key, x in layouts.official(trained.state_dict()).items()}
    torch.save({"state_dict": {"model": state}}, "theirs.pth")
    assert run("theirs.pth", "ours.pth") is None
    assert_same(load("ours.pth")["model"], trained.state_dict())
    said = capsys.readouterr().out
    assert "'theirs.pth': the model's weights are those under 'state_dict.model'" in said
    assert "'net.' removed from names" in said


def test_what_belongs_to_the_weights_is_kept_with_them(make_trained, run):
    torch.save(layouts.official(make_trained().state_dict()), "theirs.pth")
    run("theirs.pth", "ours.pth")
    assert load("ours.pth")["dino_d2"] == {
        "classes": None,
        "position_temperature": 20.0,
        "position_offset": 0.0,
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "stride_in_1x1": False,
    }


def test_the_encoding_of_a_published_file_is_written_down(make_trained, run):
    release = RELEASES["detrex/dino_R_50_4scale_12ep"]
    torch.save(layouts.detrex(make_trained().state_dict()), release.file)
    run(release.file, "ours.pth")
    description = load("ours.pth")["dino_d2"]
    assert (description["position_temperature"], description["position_offset"]) == (10000.0, -0.5)


def test_the_classes_of_coco_are_written_down(make_trained, run):
    state = make_trained().state_dict()
    for key in ("weight", "bias"):
        for head in ("query_selection.class_head", "decoder.class_heads.0"):
            x = state[f"{head}.{key}"]
            state[f"{head}.{key}"] = torch.cat([x] * 27)[:80]
    torch.save(layouts.detrex(state), "theirs.pth")
    run("theirs.pth", "ours.pth")
    assert load("ours.pth")["dino_d2"]["classes"] == list(COCO_80)


def test_a_checkpoint_of_our_own_is_shared_in_the_official_layout(make_trained, run):
    trained = make_trained()
    Checkpointer(trained, ".", classes=["a", "b", "c"]).save("model_final", iteration=7)
    assert run("model_final.pth", "official.pth", "--to", "official") is None
    expected = layouts.official(trained.state_dict())
    expected["label_enc.weight"][-1] = 0
    checkpoint = load("official.pth")
    assert_same(checkpoint["model"], expected)
    description = load("model_final.pth")["dino_d2"]
    assert checkpoint == {"model": checkpoint["model"], "dino_d2": description}
    assert description["classes"] == ["a", "b", "c"]


def test_the_official_layout_of_other_settings_is_loaded_with_them(make_trained, run):
    """The official ones would be taken for granted without the description beside them."""
    release = RELEASES["detrex/dino_R_50_4scale_12ep"]
    trained, model = make_trained(shared_heads=False), make_trained(shared_heads=False)
    torch.save({"model": layouts.detrex(trained.state_dict())}, release.file)
    assert run(release.file, "official.pth", "--to", "official") is None
    model.encoder.position_temperature, model.encoder.position_offset = 10000.0, -0.5
    Checkpointer(model, complete=True).load("official.pth")
    assert_same(model.state_dict(), trained.state_dict())
    model.encoder.position_temperature, model.encoder.position_offset = 20.0, 0.0
    with pytest.raises(CheckpointError, match=r"position_temperature 10000\.0, but the model has"):
        Checkpointer(model).load("official.pth")


def test_the_official_layout_of_named_classes_is_loaded_by_their_names(make_trained, run):
    trained, model = make_trained(), make_trained()
    Checkpointer(trained, ".", classes=["a", "b", "c"]).save("model_final")
    assert run("model_final.pth", "official.pth", "--to", "official") is None
    Checkpointer(model, classes=["c", "a", "b"], complete=True).load("official.pth")
    bias = trained.decoder.class_heads[0].bias
    assert torch.equal(model.decoder.class_heads[0].bias, bias[[2, 0, 1]])


def test_a_checkpoint_of_our_own_keeps_its_description(make_trained, run):
    trained = make_trained()
    trained.encoder.position_offset = -0.5
    Checkpointer(trained, ".", classes=["a", "b", "c"]).save("model_final", iteration=7)
    assert run("model_final.pth", "small.pth") is None
    original, small = load("model_final.pth"), load("small.pth")
    assert small["dino_d2"] == original["dino_d2"] and small["dino_d2"]["classes"] == [
        "a",
        "b",
        "c",
    ]
    assert small.keys() == {"model", "dino_d2"}


def test_a_model_without_proposals_is_converted(make_trained, run):
    trained = make_trained(query_selection=modeling.StaticQueries, denoising=None)
    torch.save(trained.state_dict(), "model.pth")
    assert run("model.pth", "small.pth") is None
    assert_same(load("small.pth")["model"], trained.state_dict())


def test_a_published_checkpoint_is_converted_by_name(make_trained, run, monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    release = RELEASES["official/dino_R_50_4scale_12ep"]
    trained = make_trained()
    (tmp_path / "cache" / "dino_d2").mkdir(parents=True)
    torch.save(
        layouts.official(trained.state_dict()), tmp_path / "cache" / "dino_d2" / release.file
    )
    assert run(f"dino_d2://{release.name}", "ours.pth") is None
    assert_same(load("ours.pth")["model"], trained.state_dict())


def test_a_file_that_exists_is_not_overwritten(make_trained, run):
    torch.save(layouts.official(make_trained().state_dict()), "theirs.pth")
    Path("ours.pth").write_text("precious")
    assert "'ours.pth' exists" in run("theirs.pth", "ours.pth")
    assert Path("ours.pth").read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "is not a file"),
        (b"<html>", "it is a web page"),
        (b"", "it is empty"),
        ({"conv1.weight": torch.ones(1)}, "not a DINO in a known format"),
        ({"layer1.0.conv1.weight": torch.ones(1)}, "not a DINO in a known format"),
        ({"level_embed": torch.ones(1)}, "'theirs.pth': this is neither DINO"),
        ({"transformer.level_embed": torch.ones(1)}, "this is neither DINO nor"),
        (
            dict.fromkeys(["transformer.level_embed", CONTENT], torch.ones(1)),
            "not a DINO in a known",
        ),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(run, content, complaint):
    if isinstance(content, bytes):
        Path("theirs.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, "theirs.pth")
    message = run("theirs.pth", "ours.pth")
    assert message.startswith("convert_checkpoint.py: ") and complaint in message
    assert "\n" not in message and not Path("ours.pth").exists()


def test_the_averaged_weights_of_a_training_are_taken_when_asked_for(make_trained, run, tmp_path):
    model, average = make_trained(), make_trained()
    ema = EMA(average, 0.9)
    Checkpointer(model, str(tmp_path), ema=ema).save("trained")
    assert run("trained.pth", "average.pth", "--ema") is None
    assert_same(load("average.pth")["model"], average.state_dict())
    assert load("average.pth").keys() == {"model", "dino_d2"}
    assert run("trained.pth", "raw.pth") is None
    assert_same(load("raw.pth")["model"], model.state_dict())
    assert "no averaged weights" in run("raw.pth", "none.pth", "--ema")


def test_a_folder_that_is_not_there_is_one_sentence(make_trained, run):
    torch.save(layouts.official(make_trained().state_dict()), "theirs.pth")
    message = run("theirs.pth", "nowhere/ours.pth")
    assert "'nowhere/ours.pth' cannot be written" in message and "\n" not in message


def test_the_program_explains_itself(run, capsys):
    assert run("--help") == "0"
    assert "--to official" in capsys.readouterr().out
