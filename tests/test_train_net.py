"""The program `train_net.py`, as people run it: both config styles, bad input, resume."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from torch.multiprocessing import ProcessExitedException

from dino_d2.config.styles import get, keys_for, read_config, scale_images
from dino_d2.data import generate
from dino_d2.engine import run
from dino_d2.engine.plan import make_plan
from dino_d2.weights import files
from dino_d2.weights.checkpointer import Checkpointer
from dino_d2.weights.model_zoo import get_config, get_config_file

PROGRAMS = Path(__file__).parents[1] / "projects" / "dino"
sys.path.insert(0, str(PROGRAMS))
import train_net  # noqa: E402

# A training of no use but for being short, in both styles.
TINY = {
    ".yaml": [
        *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("MODEL.DINO.ENCODER_LAYERS", "1", "MODEL.DINO.DECODER_LAYERS", "1"),
        *("SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.WARMUP_ITERS", "0", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "0"),
    ],
    ".py": [
        "train.device=cpu",
        "dataloader.train.mapper.augmentations.min_sizes=[64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        *("model.encoder.num_layers=1", "model.decoder.num_layers=1"),
        *("dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"),
        *("dataloader.test.num_workers=0", "lr_multiplier.warmup_length=0.0"),
        *("train.checkpointer.period=2", "train.eval_period=0"),
    ],
}
KEYS = {
    ".yaml": {"output": "OUTPUT_DIR", "iterations": "SOLVER.MAX_ITER", "weights": "MODEL.WEIGHTS"},
    ".py": {
        "output": "train.output_dir",
        "iterations": "train.max_iter",
        "weights": "train.init_checkpoint",
    },
}
STYLES = [".yaml", ".py"]


def overrides(style, **values):
    pairs = [(KEYS[style][name], str(value)) for name, value in values.items()]
    if style == ".py":
        return [*TINY[style], *(f"{key}={value}" for key, value in pairs)]
    return [*TINY[style], *(word for pair in pairs for word in pair)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    generate(root, num_train=12, num_val=6)
    return root


@pytest.fixture
def data(shapes):
    return [
        *("--train-json", f"{shapes}/train.json", "--train-images", f"{shapes}/images"),
        *("--val-json", f"{shapes}/val.json", "--val-images", f"{shapes}/images"),
    ]


def config(style, name="quickstart"):
    return ["--config-file", get_config_file(name + style)]


def parse(*words):
    return train_net.argument_parser().parse_args([str(word) for word in words])


def run_program(*words):
    """The output of train_net.py in a process of its own; it has to succeed."""
    command = [sys.executable, PROGRAMS / "train_net.py", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def complaint(monkeypatch, *words):
    """The sentence that train_net.py ends with."""
    monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        train_net.invoke_main()
    return str(end.value)


@pytest.fixture
def run_here(monkeypatch, caplog, in_process, without_plots):
    """The log of train_net.py in this process, which has imported what it needs."""

    def run(*words):
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, words)])
        with caplog.at_level(logging.INFO):
            train_net.invoke_main()
        return caplog.text

    return run


@pytest.mark.slow
def test_train_stop_resume_evaluate(data, run_here, tmp_path):
    """Of a YAML config the folder of data is trained on below, and it goes on in test_run.py."""
    common = [*config(".py"), *data]
    first = run_program(*common, *overrides(".py", output=tmp_path, iterations=2))
    assert "Starting training from iteration 0" in first

    second = run_here(*common, "--resume", *overrides(".py", output=tmp_path, iterations=4))
    assert "Starting training from iteration 2" in second
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    written = set().union(*metrics)
    assert {"total_loss", "loss_class_enc", "loss_giou_dn", "bbox/AP"} <= written
    assert (tmp_path / "model_final.pth").is_file()
    assert list(tmp_path.glob("events.out.tfevents*"))

    weights = tmp_path / "model_final.pth"
    options = overrides(".py", output=tmp_path / "evaluation", weights=weights)
    evaluation = run_here(*common, "--eval-only", *options)
    scores, *_ = re.findall(r"copypaste: (\d.*)", evaluation)  # of the boxes, the first table
    assert float(scores.split(",")[0]) == pytest.approx(metrics[-1]["bbox/AP"], abs=1e-3)


@pytest.mark.parametrize("style", STYLES)
def test_data_by_path_reaches_both_styles(style, data, shapes):
    cfg = train_net.load_job(parse(*config(style), *data, *overrides(style))).cfg
    train, test = f"{shapes}/train.json@{shapes}/images", f"{shapes}/val.json@{shapes}/images"
    if style == ".py":
        names = cfg.dataloader.train.dataset.names, cfg.dataloader.test.dataset.names
        assert cfg.dataloader.evaluator.dataset_name == test
    else:
        names = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    assert (*names[0], *names[1]) == (train, test)
    assert len(MetadataCatalog.get(train).thing_classes) == 4


@pytest.mark.parametrize("style", STYLES)
def test_evaluation_needs_no_training_data(style, data, shapes):
    options = overrides(style, weights=shapes / "val.json")  # any file: it is not read yet
    cfg = train_net.load_job(parse(*config(style), *data[4:], "--eval-only", *options)).cfg
    model = cfg.model if style == ".py" else cfg.MODEL.DINO
    assert model["num_classes" if style == ".py" else "NUM_CLASSES"] == 4


@pytest.mark.parametrize("style", STYLES)
def test_the_number_of_classes_is_written_down(style, data):
    cfg = train_net.load_job(parse(*config(style), *data, *overrides(style))).cfg
    assert (cfg.model.num_classes if style == ".py" else cfg.MODEL.DINO.NUM_CLASSES) == 4


@pytest.mark.parametrize("style", STYLES)
def test_evaluation_without_a_checkpoint_is_refused(style, data, monkeypatch):
    message = complaint(monkeypatch, *config(style), *data, "--eval-only", *overrides(style))
    assert "needs a checkpoint" in message and KEYS[style]["weights"] in message


@pytest.mark.parametrize("style", STYLES)
def test_a_checkpoint_that_is_not_there_is_refused(style, data, monkeypatch):
    options = overrides(style, weights="nowhere.pth")
    message = complaint(monkeypatch, *config(style), *data, *options)
    assert "nowhere.pth" in message and KEYS[style]["weights"] in message


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("option", [[], ["--eval-only"]])
def test_a_published_checkpoint_to_download_by_hand_is_asked_for(
    style, option, data, monkeypatch, tmp_path
):
    def without_network(folder, name):
        raise OSError("no network")

    monkeypatch.setattr(files, "in_drive", without_network)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    options = overrides(style, weights="dino_d2://official/dino_R_50_4scale_24ep")
    message = complaint(monkeypatch, *config(style), *data, *option, *options)
    assert message.startswith("train_net.py: ") and "\n" not in message
    place = str(tmp_path / "dino_d2" / "checkpoint0023_4scale.pth")
    assert KEYS[style]["weights"] in message and place in message and "https://" in message


@pytest.fixture
def in_process(monkeypatch):
    """Programs of this process leave logging and random numbers as they are."""
    monkeypatch.setattr(train_net, "default_setup", lambda cfg, args: None)
    monkeypatch.setattr(train_net, "setup_logger", lambda *args, **options: None)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("option", [[], ["--eval-only"]])
def test_a_damaged_checkpoint_is_one_sentence(
    style, option, data, monkeypatch, in_process, tmp_path
):
    (tmp_path / "a.pth").write_text("<!DOCTYPE html>")
    options = overrides(style, output=tmp_path / "output", weights=tmp_path / "a.pth")
    message = complaint(monkeypatch, *config(style), *data, *option, *options)
    assert message.startswith("train_net.py: ") and "\n" not in message
    assert f"'{tmp_path / 'a.pth'}' is damaged or not a checkpoint" in message


@pytest.mark.parametrize("style", STYLES)
def test_evaluation_of_a_training_that_never_was_is_refused(
    style, data, monkeypatch, in_process, tmp_path
):
    options = overrides(style, output=tmp_path)
    words = [*config(style), *data, "--eval-only", "--resume", *options]
    assert "no checkpoint" in complaint(monkeypatch, *words)


@pytest.fixture
def started(monkeypatch):
    """The models with which trainings and evaluations of both styles begin."""
    models = []
    monkeypatch.setattr(run.Trainer, "train", lambda self, *_: models.append(self.model))
    monkeypatch.setattr(run, "evaluate", lambda plan, model, ema: models.append(model))
    return models


# Other projects' layouts have no place for the weights of distinct query selection.
AS_PUBLISHED = {
    ".yaml": ["MODEL.DINO.QUERY_SELECTION", "MixedQuerySelection"],
    ".py": ["model.query_selection._target_=dino_d2.modeling.MixedQuerySelection"],
}


def model_of(cfg):
    return build_model(cfg) if hasattr(cfg, "MODEL") else instantiate(cfg.model)


@pytest.mark.parametrize(
    ("style", "option", "layout"),
    [
        (".yaml", [], "official"),
        (".py", ["--eval-only"], "official"),
        (".py", [], "detrex"),
        (".yaml", ["--eval-only"], "mmdet"),
    ],
)
def test_weights_of_every_layout_are_where_training_and_evaluation_begin(
    style, option, layout, data, in_process, started, tmp_path
):
    words = [*config(style), *data, *option]
    options = overrides(style, output=tmp_path, weights=tmp_path / "theirs.pth", iterations=1)
    options += AS_PUBLISHED[style]
    torch.save({}, tmp_path / "theirs.pth")
    expected = model_of(train_net.load_job(parse(*words, *options)).cfg).state_dict()
    torch.save({"model": getattr(layouts, layout)(expected)}, tmp_path / "theirs.pth")
    train_net.main(parse(*words, *options))
    (model,) = started
    assert not [k for k, x in model.state_dict().items() if not torch.equal(x, expected[k])]


@pytest.mark.parametrize("style", STYLES)
def test_a_checkpoint_says_which_classes_it_was_trained_with(style, data, tmp_path):
    options = overrides(style, output=tmp_path, iterations=1)
    cfg = train_net.load_job(parse(*config(style), *data, *options)).cfg
    names = make_plan(cfg).train_sets
    checkpointer = run.make_checkpointer(model_of(cfg), str(tmp_path), names)
    assert type(checkpointer) is Checkpointer and not checkpointer.complete
    assert checkpointer.description()["dino_d2"]["classes"] == MetadataCatalog.get(names[0]).get(
        "thing_classes"
    )


@pytest.mark.parametrize("complete", [{}, {"complete": True}])
def test_other_models_keep_the_checkpointer_of_detectron2(complete, tmp_path):
    model = torch.nn.Linear(1, 1)
    checkpointer = run.make_checkpointer(model, str(tmp_path), ["no data set"], **complete)
    assert type(checkpointer) is DetectionCheckpointer and checkpointer.save_dir == str(tmp_path)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("option", "missing"), [([], "train"), (["--eval-only"], "val")])
def test_data_that_is_needed_and_not_given(style, option, missing, data, shapes, monkeypatch):
    given = data[4:] if missing == "train" else data[:4]
    options = overrides(style, weights=shapes / "val.json")
    message = complaint(monkeypatch, *config(style), *given, *option, *options)
    assert f"--{missing}-json" in message


@pytest.mark.parametrize(
    ("style", "option", "parts"),
    [
        (".yaml", ["MODEL.DINO.FOO", "1"], ["MODEL.DINO.FOO"]),
        (".yaml", ["MODEL.DEVICE"], ["'MODEL.DEVICE' has no value"]),
        (".yaml", ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"], ["CLIP_TYPE", "full_model"]),
        (".yaml", ["SOLVER.OPTIMIZER", "SGD"], ["a DINO trains with ADAMW"]),
        (".py", ["~optimizer.max_norm"], ["deletion"]),
        (".py", ["train.accumulate=two"], ["'train.accumulate'", "(int), not 'two' (str)"]),
        (".py", ["model.num_classes"], ["KEY=VALUE", "'model.num_classes'"]),
        (".py", ["model.num_clases=3"], ["did you mean: model.num_classes"]),
    ],
)
def test_a_bad_override_is_one_sentence(style, option, parts, data, monkeypatch):
    message = complaint(monkeypatch, *config(style), *data[:4], *overrides(style), *option)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("style", STYLES)
def test_a_config_that_is_not_there(style, monkeypatch):
    assert "nowhere" in complaint(monkeypatch, "--config-file", f"nowhere{style}")
    message = complaint(monkeypatch, "--config-file", f"quikstart{style}")
    assert "did you mean: quickstart, " in message


def test_no_config_at_all(monkeypatch):
    assert "--config-file is missing" in complaint(monkeypatch)


@pytest.mark.parametrize("style", STYLES)
def test_a_config_has_a_name(style, data, tmp_path):
    words = ["--config-file", f"quickstart{style}", *data, *overrides(style, output=tmp_path)]
    named, by_path = (
        train_net.load_job(parse(*x)).plan for x in (words, [*config(style), *words[2:]])
    )
    assert (named.output_dir, named.seed, named.max_iter) == (
        by_path.output_dir,
        by_path.seed,
        by_path.max_iter,
    )


@pytest.mark.parametrize("style", STYLES)
def test_the_log_shows_the_file_of_a_config_that_has_a_name(style, data, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(train_net, "default_setup", lambda cfg, args: shown.append(args))
    monkeypatch.setattr(train_net, "setup_logger", lambda *args, **options: None)
    monkeypatch.setattr(train_net, "train", lambda plan, resume: None)
    words = ["--config-file", f"quickstart{style}", *data, *overrides(style, output=tmp_path)]
    train_net.main(parse(*words))
    assert shown[0].config_file == get_config_file(f"quickstart{style}")


@pytest.mark.parametrize("style", STYLES)
def test_misspelt_files_are_answered_with_the_nearest(style, data, shapes, monkeypatch, tmp_path):
    (tmp_path / "model_final.pth").touch()
    options = overrides(style, output=tmp_path, weights=tmp_path / "model_finl.pth")
    message = complaint(monkeypatch, *config(style), *data, *options)
    assert f"{tmp_path}/model_final.pth" in message and KEYS[style]["weights"] in message
    other = [data[0], f"{shapes}/trian.json", *data[2:]]
    message = complaint(monkeypatch, *config(style), *other, *overrides(style, output=tmp_path))
    assert f"did you mean: '{shapes}/train.json'" in message
    other = [*data[:3], f"{shapes}/image", *data[4:]]
    message = complaint(monkeypatch, *config(style), *other, *overrides(style, output=tmp_path))
    assert f"did you mean: '{shapes}/images'" in message


@pytest.mark.parametrize("style", STYLES)
def test_a_device_that_pytorch_does_not_know_is_one_sentence(style, data, monkeypatch):
    option = ["train.device=cud"] if style == ".py" else ["MODEL.DEVICE", "cud"]
    message = complaint(monkeypatch, *config(style), *data, *overrides(style), *option)
    assert "did you mean: cuda" in message and "\n" not in message


@pytest.mark.parametrize("style", STYLES)
def test_training_without_validation_data_evaluates_nothing(style, data):
    cfg = train_net.load_job(parse(*config(style), *data[:4], *overrides(style))).cfg
    assert make_plan(cfg).evaluate(torch.nn.Identity()) == {}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_command_line_wins_over_the_config(style, device, data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    option = [f"train.device={device}"] if style == ".py" else ["MODEL.DEVICE", device]
    cfg = train_net.load_job(parse(*config(style), *data, *overrides(style), *option)).cfg
    assert (cfg.train.device if style == ".py" else cfg.MODEL.DEVICE) == device


@pytest.mark.parametrize("style", STYLES)
def test_options_stand_for_keys_of_either_style(style, data, tmp_path, monkeypatch):
    words = ("--epochs", "2", "--batch-size", "2", "--lr", "1e-5", "--device", "cpu")
    output = ("--output", tmp_path / "out")
    cfg = train_net.load_job(parse(*config(style), *data, *words, *output)).cfg
    keys = keys_for(cfg)
    names = ("max_iter", "batch", "device", "output_dir")
    found = [get(cfg, getattr(keys, name)) for name in names]
    assert found == [12, 2, "cpu", str(tmp_path / "out")]  # of 12 images
    assert get(cfg, keys.lr) <= 1e-5  # it may follow the batch
    twice = overrides(style, output=tmp_path)
    message = complaint(monkeypatch, *config(style), *data, *output, *twice)
    assert f"--output sets {keys.output_dir}: give only one" in message


@pytest.mark.parametrize("style", STYLES)
def test_all_sides_of_images_follow_one(style, data):
    words = ["--config-file", f"dino_R_50_4scale_12ep{style}", *data, "--size", "400"]
    weights = ["train.init_checkpoint="] if style == ".py" else ["MODEL.WEIGHTS", ""]
    cfg = train_net.load_job(parse(*words, *weights)).cfg
    if style == ".py":
        train = cfg.dataloader.train.mapper.augmentations
        test = cfg.dataloader.test.mapper.augmentations[0]
        found = test.short_edge_length, test.max_size, train.max_size
        lists = train.min_sizes, train.crop_min_sizes, train.crop_size
    else:
        sizes = cfg.INPUT
        found = sizes.MIN_SIZE_TEST, sizes.MAX_SIZE_TEST, sizes.MAX_SIZE_TRAIN
        lists = sizes.MIN_SIZE_TRAIN, sizes.CROP.MIN_SIZE_TRAIN, sizes.CROP.SIZE
    assert found == (400, 666, 666)
    assert [*lists[0][:2], *lists[1], *lists[2]] == [240, 256, 200, 250, 300, 192, 300]


@pytest.mark.parametrize(
    ("style", "size", "option", "said"),
    [
        (".yaml", "0", [], "the size of images (--size) is 0"),
        (".yaml", "64", ["INPUT.MAX_SIZE_TEST", "80"], "--size sets INPUT.MAX_SIZE_TEST"),
        (".py", "64", ["dataloader.train.mapper.augmentations.max_size=80"], "--size sets data"),
    ],
)
def test_a_size_that_cannot_be_is_one_sentence(style, size, option, said, data, monkeypatch):
    message = complaint(monkeypatch, *config(style), *data, "--size", size, *option)
    assert said in message and "\n" not in message


@pytest.mark.parametrize("short", [0, [64, 96], None])
def test_sides_need_one_to_follow(short):
    cfg = get_config("quickstart.yaml")
    cfg.INPUT.MIN_SIZE_TEST = short
    with pytest.raises(ValueError, match="in proportion to INPUT.MIN_SIZE_TEST, which is"):
        scale_images(cfg, 64)


@pytest.mark.parametrize("style", STYLES)
def test_a_gpu_that_is_not_there_is_one_sentence(style, data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = complaint(monkeypatch, *config(style), *data, "--device", "cuda")
    remedy = "train.device=cpu" if style == ".py" else "MODEL.DEVICE cpu"
    assert "no GPU" in message and remedy in message and "\n" not in message


@pytest.mark.parametrize("style", STYLES)
def test_where_no_device_is_named_it_is_what_there_is(style, data, monkeypatch, caplog):
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        cfg = train_net.load_job(parse(*config(style), *data, "--epochs", "1")).cfg
        assert get(cfg, keys_for(cfg).device) == device
        assert ("no GPU: the CPU is used" in caplog.text) == (device == "cpu")


@pytest.mark.parametrize("style", STYLES)
def test_bad_data_ends_before_training_with_one_sentence(
    style, data, shapes, monkeypatch, tmp_path
):
    dataset = json.loads((shapes / "val.json").read_text())
    dataset["categories"][0]["name"] = "hexagon"
    (tmp_path / "val.json").write_text(json.dumps(dataset))
    other = [*data[:5], tmp_path / "val.json", *data[6:]]
    options = overrides(style, output=tmp_path / "output")
    message = complaint(monkeypatch, *config(style), *other, *options)
    assert "hexagon" in message and "circle" in message and "\n" not in message
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("style", "number"),
    [(".yaml", ["MODEL.DINO.NUM_CLASSES", "9"]), (".py", ["model.num_classes=9"])],
)
def test_a_number_of_classes_that_contradicts_the_data(style, number, data, monkeypatch):
    message = complaint(monkeypatch, *config(style), *data, *overrides(style), *number)
    assert "9 classes" in message and "has 4" in message


@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        pytest.param("Predecessors/dab_deformable_detr_R_50_50ep", marks=pytest.mark.slow),
    ],
)
def test_the_config_that_a_lazy_training_saved_trains(name, data, tmp_path):
    options = overrides(".py", output=tmp_path)
    if name != "quickstart":  # others have no such scheduler
        options.remove("lr_multiplier.warmup_length=0.0")
    words = [*data, *options, "train.init_checkpoint=''"]
    first = train_net.load_job(parse(*config(".py", name), *words)).cfg
    LazyConfig.save(first, str(tmp_path / "config.yaml"))
    # without the data, which the config has written down
    second = train_net.load_job(parse("--config-file", tmp_path / "config.yaml")).cfg
    assert second.model.num_classes == 4 and second.train.output_dir == str(tmp_path)
    assert second.dataloader.train.dataset.names == first.dataloader.train.dataset.names
    shapes = [
        {key: x.shape for key, x in model_of(cfg).state_dict().items()} for cfg in (first, second)
    ]
    assert shapes[0] == shapes[1]
    model = model_of(second)
    second.optimizer.params.model = model
    assert isinstance(instantiate(second.optimizer), torch.optim.AdamW)
    assert len(next(iter(instantiate(second.dataloader.train)))) == 2


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("text.yaml", "hello", "text.yaml"),
        ("broken.py", "model = (", "broken.py"),
        ("name.py", "model = nowhere", "nowhere"),
        ("other.yaml", "SOLVR: 1", "other.yaml': there is no key 'SOLVR' in the config; did you"),
        ("empty.py", "", "'dataloader'"),
        ("empty.yaml", "# nothing", "empty.yaml' is empty"),
        ("list.yml", "[1, 2]", "list.yml' is not a config: it has no keys"),
        ("broken.py", "a = 1\nmodel = (", "broken.py has syntax error!, line 2"),
        ("name.py", "a = 1\nmodel = nowhere", "name.py', line 2: NameError: name 'nowhere'"),
        ("lost.yaml", "_BASE_: no.yaml", "lost.yaml': its _BASE_ cannot be read"),
        ("zero.py", "model = 1 / 0", "zero.py', line 1: ZeroDivisionError"),
    ],
)
def test_a_config_that_is_none_is_one_sentence(name, content, part, monkeypatch, tmp_path):
    (tmp_path / name).write_text(content)
    message = complaint(monkeypatch, "--config-file", tmp_path / name)
    assert message.startswith("train_net.py: ") and part in message and "\n" not in message


def test_a_config_of_no_known_style(monkeypatch, tmp_path):
    (tmp_path / "config.toml").touch()
    message = complaint(monkeypatch, "--config-file", tmp_path / "config.toml")
    assert "config.toml" in message and ".yaml" in message


def test_annotations_without_their_images(monkeypatch, capsys):
    assert complaint(monkeypatch, *config(".yaml"), "--val-json", "val.json") == "2"
    assert "--val-json and --val-images go together" in capsys.readouterr().err


def test_other_models_of_detectron2_train_with_their_own_optimizer(data, tmp_path):
    file = tmp_path / "faster_rcnn.yaml"
    file.write_text("MODEL: {META_ARCHITECTURE: GeneralizedRCNN, DEVICE: cpu}")
    words = ["--config-file", file, *data, "MODEL.ROI_HEADS.NUM_CLASSES", 4]
    for optimizer, kind in (([], "SGD"), (["SOLVER.OPTIMIZER", "ADAMW"], "AdamW")):
        plan = make_plan(train_net.load_job(parse(*words, *optimizer)).cfg)
        assert isinstance(plan.build_optimizer(torch.nn.Linear(1, 1)), getattr(torch.optim, kind))


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("RetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
    ],
)
def test_other_models_have_as_many_classes_as_the_data(
    architecture, key, data, monkeypatch, tmp_path
):
    file = tmp_path / "other.yaml"
    file.write_text(f"MODEL: {{META_ARCHITECTURE: {architecture}, DEVICE: cpu}}")
    message = complaint(monkeypatch, "--config-file", file, *data)
    assert message.endswith(
        f"{key} is 80, but the data has 4 classes: end the command with {key} 4"
    )


def test_lazy_configs_of_detectron2_are_told_from_ours(data, monkeypatch):
    file = detectron2_zoo.get_config_file("COCO-Detection/fcos_R_50_FPN_1x.py")
    message = complaint(monkeypatch, "--config-file", file, *data)
    assert "the section 'train.ema' of the LazyConfig is missing" in message
    assert "lazyconfig_train_net.py" in message


def test_the_optimizer_of_the_config(data):
    cfg = train_net.load_job(parse(*config(".yaml"), *data, *overrides(".yaml"))).cfg
    optimizer = make_plan(cfg).build_optimizer(torch.nn.Linear(1, 1))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["max_norm"], optimizer.defaults["lr"]) == (0.1, cfg.SOLVER.BASE_LR)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--num-gpus", "0"], "at least 1"),
        (["--num-gpus", "-1"], "at least 1"),
        (["--num-machines", "2"], "--dist-url tcp://HOST:PORT"),
    ],
)
def test_workers_that_cannot_be(words, part, data, monkeypatch, capsys):
    assert complaint(monkeypatch, *config(".yaml"), *data, *words) == "2"
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(("code", "part"), [(-9, "killed by signal 9"), (3, "3")])
def test_workers_that_end_before_their_time(code, part, data, monkeypatch, tmp_path):
    def launch(worker, args):
        raise ProcessExitedException("a worker", 0, 1234, code)

    monkeypatch.setattr(train_net, "launch", launch)
    options = overrides(".yaml", output=tmp_path)
    assert part in complaint(monkeypatch, *config(".yaml"), *data, *options)


def test_an_interrupted_training_says_how_it_goes_on(data, monkeypatch, tmp_path):
    def main(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_net, "main", main)
    options = overrides(".yaml", output=tmp_path)
    assert "--resume" in complaint(monkeypatch, *config(".yaml"), *data, *options)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("place", ["a file", "in a file", "/proc/dino_d2"])
def test_an_output_folder_that_cannot_be_written_to(style, place, data, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    folder = {"a file": tmp_path / "file", "in a file": tmp_path / "file" / "output"}
    options = overrides(style, output=folder.get(place, place))
    message = complaint(monkeypatch, *config(style), *data, *options)
    assert KEYS[style]["output"] in message and "cannot be written to" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "option",
    [
        ("TEST.PRECISE_BN.ENABLED", "True"),
        ("TEST.EXPECTED_RESULTS", "[['bbox','AP',38.5,0.2]]"),
    ],
)
def test_what_detectron2_has_and_this_has_not_is_refused(option, data, monkeypatch, tmp_path):
    options = overrides(".yaml", output=tmp_path)
    message = complaint(monkeypatch, *config(".yaml"), *data, *options, *option)
    assert f"{option[0]} has no effect here: leave it at" in message


def test_detectron2s_own_scaling_counts_workers(data, tmp_path):
    """Written for 4 workers with 16 images, run by 1: a quarter of all, four times as long."""
    options = overrides(".yaml", output=tmp_path, iterations=100)
    words = [*options, "SOLVER.REFERENCE_WORLD_SIZE", "4", "SOLVER.IMS_PER_BATCH", "16"]
    cfg = train_net.load_job(parse(*config(".yaml"), *data, *words)).cfg
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.REFERENCE_BATCH) == (4, 400, 4)
    assert solver.BASE_LR == pytest.approx(0.001 / 4)


@pytest.mark.parametrize("style", STYLES)
def test_what_the_command_line_says_is_not_scaled(style, data, tmp_path):
    """The quick start is for 4 images a step; here there are 2."""
    options = overrides(style, output=tmp_path, iterations=100)
    cfg = train_net.load_job(parse(*config(style), *data, *options)).cfg
    plan = make_plan(cfg)
    lr = cfg.SOLVER.BASE_LR if style == ".yaml" else cfg.optimizer.lr
    assert lr == pytest.approx(0.001 / 2) and plan.max_iter == 100
    assert plan.checkpoint_period == 2  # of the command line, too


@pytest.mark.parametrize("style", STYLES)
def test_a_batch_that_workers_cannot_share_is_one_sentence(style, data, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # or there are fewer than workers
    options = overrides(style, output=tmp_path)
    words = [*config(style), *data, "--num-gpus", "3", *options]
    assert "2 images cannot be divided" in complaint(monkeypatch, *words)


@pytest.mark.parametrize(
    ("style", "option"),
    [(".yaml", ["WANDB.PROJECT", "cells"]), (".py", ["train.wandb_project=cells"])],
)
def test_a_training_for_wandb_without_wandb_is_refused(style, option, data, monkeypatch, tmp_path):
    monkeypatch.setattr("dino_d2.engine.writers.importlib.util.find_spec", lambda _: None)
    options = [*overrides(style, output=tmp_path), *option]
    assert "pip install wandb" in complaint(monkeypatch, *config(style), *data, *options)


# ---- which data


def chosen(style, *words):
    """Names of the training and of the test sets."""
    cfg = train_net.load_job(parse(*config(style), *words)).cfg
    if style == ".py":
        return [list(cfg.dataloader[x].dataset.names) for x in ("train", "test")]
    return [list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)]


def named(style, tmp_path, **names):
    """Overrides that name data sets, and the rest of what a run needs."""
    keys = {"yaml": "DATASETS.{}", "py": "dataloader.{}.dataset.names"}
    words = [*overrides(style, output=tmp_path)]
    for split, value in names.items():
        key = keys[style[1:]].format(split.upper() if style == ".yaml" else split)
        texts = ",".join(f"'{x}'" for x in value)
        words += [f"{key}=[{texts}]"] if style == ".py" else [key, f"({texts},)"]
    return words


@pytest.mark.parametrize("style", STYLES)
def test_a_folder_is_data(style, shapes, tmp_path, capsys):
    folder = str(shapes)
    words = ["--data", folder, *overrides(style, output=tmp_path)]
    assert chosen(style, *words) == [[f"{folder}@train"], [f"{folder}@val"]]


@pytest.mark.parametrize("style", STYLES)
def test_classes_are_changed_in_all_data_that_the_command_line_names(style, data, shapes, tmp_path):
    changes = ["--drop", "star", "--merge", "polygon=square,triangle", "--ignore", "circle"]
    end = "?drop=star&merge=polygon=square,triangle&ignore=circle"
    for words, names in (
        (["--data", shapes], [f"{shapes}@{x}" for x in ("train", "val")]),
        (data, [f"{shapes}/{x}.json@{shapes}/images" for x in ("train", "val")]),
    ):
        words = [*map(str, words), *changes, *overrides(style, output=tmp_path)]
        assert chosen(style, *words) == [[f"{name}{end}"] for name in names]
    # the names alone are enough, as saved configs have them
    words = named(style, tmp_path, train=[names[0] + end], test=[names[1] + end])
    cfg = train_net.load_job(parse(*config(style), *words)).cfg
    assert get(cfg, keys_for(cfg).num_classes) == 1


@pytest.mark.parametrize("style", STYLES)
def test_what_the_command_line_names_stays(style, data, shapes, tmp_path):
    train, val = (f"{shapes}/{x}.json@{shapes}/images" for x in ("train", "val"))
    train_words, val_words = data[:4], data[4:]
    two = [train, f"{shapes}/train.json@{shapes}/./images"]
    assert chosen(style, *val_words, *named(style, tmp_path, train=two)) == [two, [val]]
    assert chosen(style, *train_words, *named(style, tmp_path, test=[val])) == [[train], [val]]
    # COCO, which the configs name, is nobody's data until it is named.
    assert chosen(style, *train_words, *named(style, tmp_path)) == [[train], []]
    with pytest.raises(ValueError, match="the val data is named as .* and as .*: drop one"):
        chosen(style, *data, *named(style, tmp_path, test=[val]))


@pytest.mark.parametrize("style", STYLES)
def test_boxes_are_looked_at_before_a_training(style, shapes, tmp_path, caplog, clean_catalogs):
    register_coco_instances("mine", {}, f"{shapes}/train.json", f"{shapes}/images")
    for names in ([f"{shapes}@train"], ["mine"]):
        options = [*named(style, tmp_path, train=names, test=names), *fewer_queries(style)]
        plan = train_net.load_job(parse(*config(style), *options)).plan
        caplog.clear()
        with caplog.at_level("INFO", "dino_d2"):
            run.training_loader(plan)
        said = " ".join(x.getMessage() for x in caplog.records)
        assert "Boxes as trained: " in said
        assert "of 12 images checked: more boxes" in said and "queries (1)" in said


def fewer_queries(style):
    key = {".yaml": "MODEL.DINO.NUM_QUERIES", ".py": "model.query_selection.num_queries"}[style]
    return [key, 1] if style == ".yaml" else [f"{key}=1"]


@pytest.mark.slow
def test_a_folder_trains_and_is_evaluated_by_its_name_alone(shapes, run_here, tmp_path):
    common = [*config(".yaml"), *overrides(".yaml", output=tmp_path, iterations=2)]
    said = run_program(*common[:2], "--data", shapes, *common[2:])
    about = f"'{shapes}' is COCO: train 12 images"
    assert about in said and about in (tmp_path / "log.txt").read_text()
    assert said.count("Boxes as trained: ") == 1
    again = ["--config-file", tmp_path / "config.yaml", "--eval-only"]
    assert "copypaste" in run_here(*again, "MODEL.WEIGHTS", tmp_path / "model_final.pth")


WRONG = {
    ".yaml": [
        (["MODEL.DINO.QUERY_SELECTION", "Mixed"], "MODEL.DINO.QUERY_SELECTION is 'Mixed'"),
        (["MODEL.DINO.IN_FEATURES", "['res9']"], "'res9', which the backbone does not have"),
        (["MODEL.DINO.NUM_CLASSES", "x"], "num_classes is 'x'"),
        (["DATALOADER.SAMPLER_TRAIN", "x"], "Unknown training sampler: x"),
        (
            [
                *("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"),
                *("DATALOADER.RANDOM_SUBSET_RATIO", "-1.0"),
            ],
            "the training data loader cannot be built from this config (AssertionError",
        ),
        (["SOLVER.WEIGHT_DECAY_BIAS", "nan"], "bias_weight_decay is 'nan'"),
        (["SOLVER.BIAS_LR_FACTOR", "-1.0"], "bias_multiplier is -1.0"),
        (["SOLVER.WARMUP_FACTOR", "-1.0"], "SOLVER.WARMUP_FACTOR is -1.0"),
        (["MODEL.DINO.NUM_HEADS", "7"], "is not a multiple of num_heads 7"),
        (["MODEL.BACKBONE.NAME", "build_resnet"], "did you mean: build_resnet_backbone"),
        (["MODEL.META_ARCHITECTURE", "DINOO"], "META_ARCHITECTURE is 'DINOO'"),
        (["MODEL.RESNETS.DEPTH", "19"], "the model cannot be built from this config (KeyError: 19"),
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "LR_SCHEDULER_NAME is 'Cosine'"),
        (["SOLVER.OPTIMIZER", "ADAM"], "it can be ADAMW or SGD; did you mean: ADAMW"),
        (["SOLVER.WEIGHT_DECAY", "-1"], "weight_decay is -1.0"),
        (["SOLVER.WARMUP_METHOD", "slow"], "WARMUP_METHOD is 'slow'; available: linear, constant"),
        (["INPUT.FORMAT", "XYZ"], "the image format is 'XYZ', not one of 8 bits per channel"),
        (["INPUT.RANDOM_FLIP", "sideways"], "'sideways'"),
        (
            ["TEST.NMS", "1.2"],
            "nms (TEST.NMS, model.nms) is 1.2; it has to be a number from 0 to 1",
        ),
        (["MODEL.DINO.BRANCHES", "['OneToManyHead','OneToManyHead']"], "'OneToManyHead' twice"),
        (
            ["MODEL.DINO.RELATION", "DistinctQueries", "MODEL.DINO.PASSES", "['SeparatePass']"],
            "which DistinctQueries (MODEL.DINO.RELATION, model.decoder.relation) suppresses",
        ),
        (["INPUT.MIXING.SPAN", "(0.2,0.8)"], "has no effect without INPUT.MIXING.MOSAIC or MIXUP"),
        (["INPUT.MIXING.MIXUP", "0.5", "INPUT.MIXING.SPAN", "(0.5,0.5)"], "SPAN"),
        (
            ["TEST.PATIENCE", "3", "TEST.EVAL_PERIOD", "0"],
            "needs evaluations of a test set: set TEST",
        ),
        (["SOLVER.FLAT_SHARE", "0.7"], "no effect without SOLVER.LR_SCHEDULER_NAME WarmupFlat"),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupFlatCosineLR", "SOLVER.FLAT_SHARE", "70"],
            "flat (SOLVER.FLAT_SHARE) is 70.0; it has to be a number from 0 to 1",
        ),
        (["INPUT.MIXING.MIXUP", "0.5", "INPUT.MIXING.SPAN", "(0.5,)"], "give two fractions of"),
        (["TEST.BEST_METRIC", "bbox/mAP"], "did you mean: bbox/AP"),
        (["TEST.BEST_METRIC", "ema/bbox/AP"], "EMA adds 'ema/' by itself"),
        (["TEST.BEST_METRIC", "dAP/missed"], "which evaluation does not give; available: bbox/AP,"),
        (["DATALOADER.NUM_WORKERS", "-1"], "DATALOADER.NUM_WORKERS is -1"),
    ],
    ".py": [
        (["model=3"], "'model' is a section: name one of its keys"),
        (["dataloader.train=3"], "the section 'dataloader.train' of the LazyConfig is 3"),
        (["model.neck.in_features=[res9]"], "'res9', which the backbone does not have"),
        (["model.encoder.num_heads=7"], "is not a multiple of num_heads 7"),
        (["lr_multiplier.warmup_length=abc"], "'lr_multiplier.warmup_length' takes values such as"),
        (["lr_multiplier.scheduler=3"], "the learning rate schedule cannot be built"),
        (["dataloader.train.mapper.augmentations.flip=sideways"], "'sideways'"),
        (["train.patience=-1"], "patience (TEST.PATIENCE, train.patience) is -1"),
        (["dataloader.mixing.mosaic=2"], "mosaic is 2"),
        (["train.best_metric=bbox/AP-cirkle"], "did you mean: bbox/AP-circle"),
        (["model.num_classes=x"], "num_classes is 'x'"),
        (
            ["dataloader.test.mapper.augmentations.0.short_edge_length=abc"],
            "the augmentation cannot be built from this config (AssertionError: short_edge_length",
        ),
        (["optimizer.lr=fast"], "optimizer.lr is 'fast'"),
        (["train.checkpointer.max_to_keep=0"], "max_to_keep is 0"),
    ],
}


@pytest.mark.parametrize(
    ("style", "option", "part"), [(style, *x) for style in STYLES for x in WRONG[style]]
)
def test_a_value_that_is_wrong_is_one_sentence_before_anything_is_printed(
    style, option, part, data, monkeypatch, capsys, tmp_path
):
    options = [*overrides(style, output=tmp_path), *option]
    message = complaint(monkeypatch, *config(style), *data, *options)
    assert part in message and "\n" not in message
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_a_metric_of_one_of_the_classes_is_known(data, tmp_path):
    words = [*overrides(".yaml", output=tmp_path), "TEST.BEST_METRIC", "bbox/AP-circle"]
    train_net.check_all(parse(*config(".yaml"), *data, *words))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("option", [[], ["--eval-only"]])
def test_weights_that_do_not_fit_are_one_sentence_before_anything_is_printed(
    style, option, data, monkeypatch, capsys, tmp_path
):
    torch.save({"model": {"other.weight": torch.zeros(3)}}, tmp_path / "a.pth")
    options = overrides(style, output=tmp_path / "output", weights=tmp_path / "a.pth")
    message = complaint(monkeypatch, *config(style), *data, *option, *options)
    assert "no tensor of" in message and "\n" not in message
    assert capsys.readouterr() == ("", "")


def test_a_second_training_in_a_folder_is_refused_before_there_are_workers(
    data, monkeypatch, tmp_path
):
    (tmp_path / "model_final.pth").write_text("x")
    options = overrides(".yaml", output=tmp_path)
    message = complaint(monkeypatch, *config(".yaml"), *data, *options)
    assert "has an earlier training run ('model_final.pth')" in message and "--overwrite" in message
    assert (tmp_path / "model_final.pth").read_text() == "x"


def test_overwriting_removes_an_earlier_training_before_there_is_a_log(
    data, in_process, started, tmp_path
):
    (tmp_path / "model_final.pth").write_text("x")
    (tmp_path / "mine.txt").write_text("x")
    options = overrides(".yaml", output=tmp_path)
    train_net.main(parse(*config(".yaml"), *data, "--overwrite", *options))
    assert not (tmp_path / "model_final.pth").exists() and (tmp_path / "mine.txt").exists()
    assert len(started) == 1


@pytest.mark.parametrize("other", ["--resume", "--eval-only"])
def test_overwriting_is_for_a_training_that_begins(other, data, monkeypatch, capsys):
    assert complaint(monkeypatch, *config(".yaml"), *data, "--overwrite", other) == "2"
    assert f"not for {other}" in capsys.readouterr().err


def test_an_interrupted_evaluation_is_not_told_to_resume(data, monkeypatch, shapes, tmp_path):
    def main(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_net, "main", main)
    monkeypatch.setattr(run, "check", lambda *args, **options: None)
    options = overrides(".yaml", output=tmp_path, weights=shapes / "val.json")
    message = complaint(monkeypatch, *config(".yaml"), *data, "--eval-only", *options)
    assert message == "train_net.py: interrupted"


def test_a_disk_that_fills_up_is_one_sentence(data, monkeypatch, tmp_path):
    def main(args):
        raise OSError(28, "No space left on device", "metrics.json")

    monkeypatch.setattr(train_net, "main", main)
    options = overrides(".yaml", output=tmp_path)
    message = complaint(monkeypatch, *config(".yaml"), *data, *options)
    assert message.startswith("train_net.py: the disk is full") and "make room" in message


def test_annotations_and_images_that_are_swapped_are_said_to_be(data, monkeypatch, tmp_path):
    swapped = ["--train-json", data[3], "--train-images", data[1]]
    options = overrides(".yaml", output=tmp_path)
    assert "are swapped" in complaint(monkeypatch, *config(".yaml"), *swapped, *options)


def test_a_comment_does_not_make_a_lazy_config(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("# _target_: nothing\nSEED: 3")
    assert read_config(str(file)).SEED == 3


def test_the_home_folder_has_its_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yml").write_text("SEED: 3")
    assert get_config_file("~/mine.yml") == str(tmp_path / "mine.yml")
