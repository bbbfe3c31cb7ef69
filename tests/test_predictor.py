"""Images in, detections out: `dino_d2.load` and the program `demo.py`."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

import dino_d2
from dino_d2.checkpoint import CheckpointError
from dino_d2.checkpoint_io import write
from dino_d2.checkpointer import Checkpointer
from dino_d2.model_zoo import get_config, get_config_file
from dino_d2.predictor import Predictor

sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "dino"))
import demo  # noqa: E402

CLASSES = ["circle", "square", "triangle"]


@pytest.fixture
def image():
    """Red at the left, blue at the right: (H, W) is (60, 90)."""
    array = np.zeros((60, 90, 3), np.uint8)
    array[:, :45, 0] = array[:, 45:, 2] = 200
    return array


@pytest.fixture
def make_predictor(make_dino):
    model = make_dino().eval()

    def make(image_format="RGB", size=64):
        resize = [T.ResizeShortestEdge(size, 1333)]
        return Predictor(model, classes=CLASSES, augmentations=resize, image_format=image_format)

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The quickstart's model with a checkpoint of its own, untrained."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = get_config("quickstart")
    cfg.MODEL.DEVICE, cfg.MODEL.DINO.NUM_CLASSES = "cpu", len(CLASSES)
    model = dino_d2.DINO(cfg)
    Checkpointer(model, str(folder), classes=CLASSES).save("model")
    return folder / "model.pth"


def test_detections_are_in_pixels_of_the_image(make_predictor, image):
    instances = make_predictor(size=32)(image)
    assert instances.image_size == (60, 90)
    x0, y0, x1, y1 = instances.pred_boxes.tensor.unbind(1)
    assert x0.min() >= 0 and y0.min() >= 0 and x1.max() <= 90 and y1.max() <= 60
    assert x1.max() > 48  # not left at the size that the model sees
    assert instances.scores.diff().max() <= 0


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_paths_pictures_and_arrays_are_the_same_image(
    make_predictor, image, image_format, tmp_path
):
    Image.fromarray(image).save(tmp_path / "image.png")
    predictor = make_predictor(image_format)
    inputs = tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(image), image
    first, *others = [predictor.prepare(x)["image"] for x in inputs]
    red, blue = (0, 2) if image_format == "RGB" else (2, 0)
    assert first[red, 0, 0] == first[blue, 0, -1] == 200
    assert all(torch.equal(first, other) for other in others)


def test_a_list_gives_a_list_and_no_image_sees_another(make_predictor, image):
    predictor = make_predictor()
    both = predictor([image, image[:, :50]])
    for together, alone in zip(both, (image, image[:, :50]), strict=True):
        torch.testing.assert_close(together.scores, predictor(alone).scores)


@pytest.mark.parametrize("config", ["quickstart", "quickstart.py", get_config_file("quickstart")])
def test_load_takes_names_and_files_and_knows_the_classes(config, trained, image):
    predictor = dino_d2.load(config, str(trained), device="cpu")
    assert predictor.classes == CLASSES and not predictor.model.training
    assert len(predictor(image)) > 0


def test_a_lazy_config_file_loads_too(trained):
    file = get_config_file("quickstart.py")
    assert dino_d2.load(file, str(trained), device="cpu").image_format == "RGB"


def test_both_styles_detect_the_same(trained, image):
    first, second = (
        dino_d2.load(f"quickstart{style}", str(trained), device="cpu")(image)
        for style in (".yaml", ".py")
    )
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)


def test_classes_without_names_are_numbered(trained, tmp_path):
    checkpoint = torch.load(trained)
    write({"model": checkpoint["model"]}, str(tmp_path / "bare.pth"))
    predictor = dino_d2.load("quickstart", str(tmp_path / "bare.pth"), device="cpu")
    assert predictor.classes == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("number", [80, 91])
def test_classes_of_coco_are_named(number, tmp_path):
    state = {"encoder.level_embed.weight": torch.zeros(1)}
    state["decoder.class_heads.0.bias"] = torch.zeros(number)
    write({"model": state}, str(tmp_path / "coco.pth"))
    names = dino_d2.predictor.classes_of(str(tmp_path / "coco.pth"))
    assert len(names) == 80 and names[0] == "person"


def test_a_backbone_detects_nothing(tmp_path):
    write({"stem.conv1.weight": torch.zeros(1)}, str(tmp_path / "backbone.pth"))
    with pytest.raises(CheckpointError, match="no weights of a trained DINO"):
        dino_d2.load("quickstart", str(tmp_path / "backbone.pth"))


def test_without_weights_there_is_nothing_to_load():
    with pytest.raises(CheckpointError, match="there are no weights"):
        dino_d2.load("quickstart")


# ---- the program


def run_demo(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, words)])
    demo.main()


@pytest.fixture
def folder(image, tmp_path):
    """Two images, one of them once more in a folder inside, and something else."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "more/a.png"):
        Image.fromarray(image).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").touch()
    return tmp_path / "images"


def test_folders_patterns_and_files_are_found(folder):
    found = demo.find_images([f"{folder}", f"{folder}/more/*", f"{folder}/a.png"])
    assert found == [folder / "a.png", folder / "b.jpg", folder / "more/a.png", folder / "a.png"]


def test_the_demo_draws_and_writes_what_it_detects(folder, trained, tmp_path, monkeypatch, capsys):
    output, file = tmp_path / "pictures", tmp_path / "detections.json"
    run_demo(
        monkeypatch,
        *("--config", "quickstart", "--weights", trained, "--device", "cpu"),
        *("--input", folder, folder / "more", "--output", output, "--json", file),
        *("--confidence-threshold", "0.001", "--batch-size", "2"),
    )
    assert {x.name for x in output.iterdir()} == {"a_0.png", "b.png", "a_2.png"}
    assert Image.open(output / "b.png").size == (90, 60)
    detections = json.loads(file.read_text())
    assert {x["image"] for x in detections} == {str(x) for x in folder.rglob("*.[jp][pn]g")}
    assert all(x["category"] in CLASSES and x["score"] >= 0.001 for x in detections)
    # x, y, width and height
    assert all(x["bbox"][0] + x["bbox"][2] <= 90.01 for x in detections)
    assert f"{len(detections)} detections in 3 images" in capsys.readouterr().out


def test_the_threshold_of_the_demo_is_kept(folder, trained, tmp_path, monkeypatch):
    file = tmp_path / "detections.json"
    options = ("--config", "quickstart", "--weights", trained, "--device", "cpu", "--json", file)
    run_demo(monkeypatch, *options, "--input", folder, "--confidence-threshold", "1.1")
    assert json.loads(file.read_text()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "quickstart", "--input", "nowhere/*.jpg"], "nowhere"),
        (["--config", "quickstrt", "--input", "{folder}"], "quickstart"),
        (["--config", "quickstart", "--weights", "nowhere.pth", "--input", "{folder}"], "nowhere"),
        (["--config", "quickstart", "--weights", "{bad}", "--input", "{folder}"], "notes.txt"),
        (["--config", "quickstart", "--weights", "{trained}", "--input", "{fake}"], "fake.png"),
    ],
)
def test_bad_input_of_the_demo_is_one_sentence(
    words, message, folder, trained, tmp_path, monkeypatch
):
    (tmp_path / "fake.png").write_text("no image")
    places = {"folder": folder, "bad": folder / "notes.txt", "trained": trained}
    words = [word.format(**places, fake=tmp_path / "fake.png") for word in words]
    with pytest.raises(SystemExit) as end:
        run_demo(monkeypatch, *words, "--json", tmp_path / "out.json", "--device", "cpu")
    assert message in str(end.value) and "\n" not in str(end.value)


@pytest.mark.parametrize("words", [[], ["--json", "out.json", "--batch-size", "0"]])
def test_the_demo_refuses_options_that_say_nothing(words, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_demo(monkeypatch, "--config", "quickstart", "--input", "x.png", *words)
    assert "--output" in capsys.readouterr().err
