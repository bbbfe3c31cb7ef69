"""`make demo`, and the pictures that it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_d2.data import generate
from dino_d2.visualize import draw_curves

PROGRAMS = Path(__file__).parents[1] / "projects" / "dino"
sys.path.insert(0, str(PROGRAMS))
import quickstart  # noqa: E402


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    generate(root, num_train=8, num_val=6)
    return root


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def sheet(shapes, output, detections):
    results = output / "results.json"
    results.write_text(json.dumps(detections))
    picture = output / "sheet.png"
    quickstart.draw_detections(shapes, results, picture)
    return pixels(picture)


def test_a_detection_is_drawn(shapes, tmp_path):
    image = json.loads((shapes / "val.json").read_text())["images"][0]
    box = {"image_id": image["id"], "category_id": 1, "bbox": [20, 20, 40, 40], "score": 0.9}
    empty, drawn = sheet(shapes, tmp_path, []), sheet(shapes, tmp_path, [box])
    assert (empty != drawn).any()


def test_a_detection_below_the_threshold_is_not_drawn(shapes, tmp_path):
    image = json.loads((shapes / "val.json").read_text())["images"][0]
    box = {"image_id": image["id"], "category_id": 1, "bbox": [20, 20, 40, 40], "score": 0.3}
    empty, unchanged = sheet(shapes, tmp_path, []), sheet(shapes, tmp_path, [box])
    assert (empty == unchanged).all()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["total_loss", "bbox/AP", "bbox/AP50"])
def test_curves_show(key, tmp_path):
    pictures = []
    for last in (2.0, 8.0):
        rows = [{"iteration": i, "total_loss": 5.0, "bbox/AP": 1, "bbox/AP50": 1} for i in range(5)]
        rows[-1][key] = last
        (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
        draw_curves(tmp_path / "metrics.json", tmp_path / "curves.png")
        pictures.append(pixels(tmp_path / "curves.png"))
    assert (pictures[0] != pictures[1]).any()


def test_a_training_without_evaluation_has_a_curve_as_well(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 0, "total_loss": 5.0}')
    draw_curves(tmp_path / "metrics.json", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.slow
def test_the_demo_says_where_everything_is(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    few_images = (
        "import functools, sys, quickstart\n"
        "few = functools.partial(quickstart.generate, num_train=8, num_val=6)\n"
        "quickstart.generate = few\n"
        "quickstart.main()"
    )
    environment["PYTHONPATH"] = os.pathsep.join([str(PROGRAMS), os.environ.get("PYTHONPATH", "")])
    tiny = ("SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2", "SOLVER.IMS_PER_BATCH", "2")
    command = [sys.executable, "-c", few_images, "--output", tmp_path, *tiny]
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1]
    assert str(tmp_path) in last and "AP50" in last
    for name in ("detections.png", "curves.png", "model_final.pth"):
        assert name in last and (tmp_path / name).stat().st_size > 1000


def run_demo(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        quickstart.main()
    return str(end.value)


def test_a_wrong_key_is_noticed_before_anything_is_drawn(monkeypatch, tmp_path):
    message = run_demo(monkeypatch, "--output", tmp_path, "SOLVER.MAX_ITR", "3")
    assert "SOLVER.MAX_ITER" in message and not list(tmp_path.iterdir())


def test_a_training_that_is_none_of_the_demo_stays(monkeypatch, tmp_path):
    (tmp_path / "model_final.pth").write_text("x")
    message = run_demo(monkeypatch, "--output", tmp_path)
    assert "not of this demo: choose another --output" in message
    assert [x.name for x in tmp_path.iterdir()] == ["model_final.pth"]


def test_the_demo_replaces_its_own_training(tmp_path):
    args = quickstart.argument_parser().parse_args(["--output", str(tmp_path)])
    assert not quickstart.training_arguments(args, tmp_path).overwrite
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "train_00000.jpg").touch()
    assert quickstart.training_arguments(args, tmp_path).overwrite


@pytest.mark.parametrize("part", ["training", "drawing"])
def test_control_c_in_the_demo_is_a_sentence(part, monkeypatch, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    for name in ("check_arguments", "generate"):
        monkeypatch.setattr(quickstart, name, lambda *args: None)
    worker = interrupt if part == "training" else lambda args: None
    monkeypatch.setattr(quickstart.train_net, "worker", worker)
    monkeypatch.setattr(quickstart, "draw_curves", interrupt)
    message = run_demo(monkeypatch, "--output", tmp_path)
    assert message.startswith("quickstart.py: interrupted before") and "\n" not in message
