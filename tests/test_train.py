"""`dino_d2.train`: a training in one call."""

import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo

import dino_d2
from dino_d2.data import generate

pytestmark = pytest.mark.usefixtures("without_plots")
SMALL = [
    *("MODEL.DINO.ENCODER_LAYERS", 1, "MODEL.DINO.DECODER_LAYERS", 1, "MODEL.DINO.FFN_DIM", 32),
    *("SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu"),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    generate(folder, num_train=4, num_val=2)
    return folder


@pytest.mark.slow
def test_a_training_is_one_call_and_gives_its_predictor(shapes, tmp_path):
    out = tmp_path / "out"
    options = {"output": out, "batch_size": 2, "lr": 1e-4, "overrides": SMALL}
    predictor = dino_d2.train("quickstart", shapes, epochs=1, **options)
    assert predictor.classes == ["circle", "square", "triangle", "star"]
    (image, *_) = sorted((shapes / "images").iterdir())
    with torch.no_grad():
        found, loaded = (x(image) for x in (predictor, dino_d2.load(out)))
    torch.testing.assert_close(found.scores, loaded.scores)
    with pytest.raises(ValueError, match="training"):  # is there already
        dino_d2.train("quickstart", shapes, epochs=1, **options)
    with pytest.raises(ValueError, match="--overwrite starts a new run"):
        dino_d2.train("quickstart", shapes, resume=True, overwrite=True, **options)
    log = (out / "log.txt").read_text()
    other = options | {"output": tmp_path / "other", "drop": "star"}
    predictor = dino_d2.train(
        "quickstart", shapes, epochs=1, merge={"polygon": ["square", "triangle"]}, **other
    )
    assert predictor.classes == ["circle", "polygon"]
    assert (out / "log.txt").read_text() == log
    other_log = (tmp_path / "other" / "log.txt").read_text()
    assert "Starting training" in other_log and "dropped star (" in other_log
    assert "Boxes as trained: " in other_log
    dino_d2.train("quickstart", shapes, epochs=2, resume=True, **options)
    assert (out / "log.txt").read_text().count("Starting training") == 2
    lines = (out / "metrics.json").read_text().splitlines()
    assert '"iteration": 4' in lines[-1]  # of four images, twice, two a step


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"config": "quickstrat"}, "quickstart"),
        ({"data": "no/folder"}, "no/folder"),
        ({"device": "cud"}, "did you mean: cuda"),
        ({"lr": 0.1, "overrides": ["SOLVER.BASE_LR", 1]}, "--lr sets SOLVER.BASE_LR"),
        ({"overrides": ["SOLVER.BASE_RL", 1]}, "BASE_LR"),
        ({"epochs": float("inf")}, "EPOCHS is inf"),
        ({"drop": "strar"}, "has no class 'strar' to drop; did you mean: star"),
        ({"data": "", "ignore": "star"}, "change the classes of data: name its folder"),
        ({"config": "quickstart.py", "epochs": float("inf")}, "epochs is inf"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_is_wrong_is_said_before_anything_is_written(shapes, tmp_path, options, sentence):
    defaults = {"config": "quickstart", "data": shapes, "output": tmp_path / "out"}
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        dino_d2.train(**(defaults | options))
    assert not list(tmp_path.glob("out/*"))


def test_the_data_may_be_those_of_the_config(tmp_path):
    with pytest.raises(ValueError, match="coco_2017_train"):
        dino_d2.train("dino_R_50_4scale_12ep", output=tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["my out", "2024", "a=b{c}"])
@pytest.mark.parametrize("style", ["yaml", "py"])
def test_a_folder_may_have_any_name(style, name, tmp_path):
    config = "dino_R_50_4scale_12ep." + style
    with pytest.raises(ValueError, match="coco_2017"):
        dino_d2.train(config, output=tmp_path / name, device="cpu")


def test_a_model_without_a_predictor_is_refused_before_it_is_trained(shapes, tmp_path):
    config = detectron2_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    options = ["MODEL.WEIGHTS", "", "MODEL.RETINANET.NUM_CLASSES", 4]
    with pytest.raises(ValueError, match="no predictor for RetinaNet"):
        dino_d2.train(config, shapes, output=tmp_path / "out", overrides=options)
    assert not (tmp_path / "out" / "log.txt").exists()
