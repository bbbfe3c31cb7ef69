"""Whole trainings, as a plan says: what they save, how they go on, what they evaluate."""

import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig
from detectron2.evaluation import COCOEvaluator
from PIL import Image

from dino_d2.data import generate, register
from dino_d2.engine import run
from dino_d2.engine.plan import make_plan
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.weights import model_zoo

pytestmark = pytest.mark.usefixtures("without_plots")
PROGRAM = Path(__file__).parents[1] / "projects" / "dino" / "train_net.py"
TINY = [
    *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(48,64)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.DINO.ENCODER_LAYERS", "1", "MODEL.DINO.DECODER_LAYERS", "1"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("TEST.EVAL_PERIOD", "2", "SOLVER.EMA.ENABLED", "True", "SOLVER.WARMUP_ITERS", "2"),
    *("DATALOADER.NUM_WORKERS", "0"),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    generate(root, num_train=5, num_val=2)
    return root


@pytest.fixture
def plan(shapes, tmp_path):
    def make(*options, output=tmp_path):
        train, val = (f"{shapes}/{x}.json@{shapes}/images" for x in ("train", "val"))
        register([train, val])
        cfg = model_zoo.get_config("quickstart")
        data = ["DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{val}',)"]
        cfg.merge_from_list([*TINY, *data, "OUTPUT_DIR", str(output), *map(str, options)])
        return make_plan(cfg)

    return make


def weights(file):
    return torch.load(file, weights_only=True)


def equal(a, b):
    """Whether two checkpoints hold the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(x, b[key]) for key, x in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.slow
def test_a_training_that_goes_on_ends_as_if_it_had_never_stopped(plan, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    period = "TEST.EVAL_PERIOD", 6
    run.train(plan(*period, output=straight))
    resumed.mkdir()
    shutil.copy(straight / "model_0000001.pth", resumed)
    (resumed / "last_checkpoint").write_text("model_0000001.pth")
    torch.manual_seed(99)
    run.train(plan(*period, output=resumed), resume=True)
    assert equal(weights(straight / "model_final.pth"), weights(resumed / "model_final.pth"))
    last = metrics(straight)[-1], metrics(resumed)[-1]
    results = [{key: x for key, x in values.items() if "/AP" in key} for values in last]
    assert len(results[0]) > 10 and str(results[0]) == str(results[1])  # NaN is not itself

    saved = weights(straight / "model_final.pth")
    assert saved.keys() == {"model", "trainer", "ema", "dino_d2", "iteration"}
    assert saved["ema"]["updates"] == 6
    assert {"bbox/AP", "ema/bbox/AP"} <= last[0].keys()
    assert (straight / "model_best.pth").is_file()
    assert (straight / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.slow
def test_a_training_that_is_killed_at_any_moment_ends_the_same(shapes, tmp_path):
    """kill -9, at two moments while checkpoints are written, one after the other."""

    def start(output):
        files = [f"{shapes}/train.json", f"{shapes}/images"]
        config = model_zoo.get_config_file("quickstart.yaml")
        command = [
            *(sys.executable, PROGRAM, "--config-file", config, "--resume"),
            *("--train-json", files[0], "--train-images", files[1]),
            *(*TINY, "OUTPUT_DIR", output, "SOLVER.MAX_ITER", "16", "TEST.EVAL_PERIOD", "0"),
        ]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    assert start(tmp_path / "straight").wait() == 0
    for number, moment in enumerate((0.07, 0.0)):
        process = start(tmp_path / "killed")
        while len(list((tmp_path / "killed").glob("model_0*.pth"))) <= 2 * number:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        assert process.wait() != 0
    assert start(tmp_path / "killed").wait() == 0
    straight, killed = (tmp_path / x / "model_final.pth" for x in ("straight", "killed"))
    assert equal(weights(straight), weights(killed))


def test_checkpoints_that_detectron2s_checkpointer_does_not_find_stay(plan, tmp_path, monkeypatch):
    def theirs(model, folder, names, **saved):
        return DetectionCheckpointer(model, folder, **saved)

    monkeypatch.setattr(run, "make_checkpointer", theirs)  # as for models that are no Detector
    (tmp_path / "model_0000001.pth").touch()
    with pytest.raises(CheckpointError, match="checkpoints, but no file 'last_checkpoint'"):
        run.train(plan(), resume=True)


def test_evaluation_is_of_the_weights_and_of_their_average(plan, tmp_path, monkeypatch):
    seen = []
    first = plan("SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0)
    model = first.build_model()
    ema = run.EMA(model, 0.5)
    with torch.no_grad():
        model.decoder.norm.weight.fill_(3)
    told = first._replace(
        evaluate=lambda x, folder="": (
            seen.append((folder, x.decoder.norm.weight[0].item())) or {"bbox": {"AP": 1}}
        )
    )
    assert run.evaluate(told, model, ema) == {"bbox": {"AP": 1}, "ema": {"bbox": {"AP": 1}}}
    assert seen == [("", 3), ("ema", 1)] and model.decoder.norm.weight[0] == 3


def test_a_checkpoint_without_averaged_weights_is_evaluated_without(plan, tmp_path, caplog):
    told = plan()
    run.make_checkpointer(told.build_model(), str(tmp_path), told.test_sets).save("raw")
    told = told._replace(weights=str(tmp_path / "raw.pth"), evaluate=lambda x: {"bbox": {"AP": 1}})
    with caplog.at_level(logging.WARNING, "dino_d2"):
        assert run.test(told) == {"bbox": {"AP": 1}}
    assert "no averaged weights" in caplog.text


def test_averaged_weights_are_of_the_models_classes(plan, tmp_path):
    """The data to evaluate on has the same classes in another order."""
    told = plan()
    model = told.build_model()
    saver = run.make_checkpointer(model, str(tmp_path), told.test_sets, ema=run.EMA(model, 0.9))
    saver.classes = saver.names = saver.names[::-1]
    saver.checkpointables["ema"].updates = 1
    saver.save("reversed")
    seen = []

    def look(x, folder=""):
        seen.append(x.decoder.class_heads[0].bias.clone())
        return {"bbox": {"AP": 1}}

    with torch.no_grad():
        model.decoder.class_heads[0].bias.copy_(torch.arange(4.0))
    saver.checkpointables["ema"].reset()
    saver.checkpointables["ema"].updates = 1
    saver.save("reversed")
    run.test(told._replace(weights=str(tmp_path / "reversed.pth"), evaluate=look))
    assert [x.tolist() for x in seen] == [[3, 2, 1, 0]] * 2


def test_averaged_weights_that_are_left_aside_are_mentioned(plan, tmp_path, caplog):
    told = plan()
    model = told.build_model()
    run.make_checkpointer(model, str(tmp_path), told.test_sets, ema=run.EMA(model, 0.9)).save("a")
    told = plan("SOLVER.EMA.ENABLED", False, "MODEL.WEIGHTS", tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, "dino_d2"):
        run.test(told._replace(evaluate=lambda x: {"bbox": {"AP": 1}}))
    assert "averaged weights, too" in caplog.text


@pytest.mark.parametrize("resume", [False, True])
def test_evaluation_takes_the_averaged_weights_of_a_checkpoint(plan, tmp_path, resume):
    told = plan()
    model = told.build_model()
    ema = run.EMA(model, 0.9)
    ema.update()
    run.make_checkpointer(model, str(tmp_path), told.test_sets, ema=ema).save("model_0000001")
    told = told._replace(
        weights="" if resume else str(tmp_path / "model_0000001.pth"),
        evaluate=lambda *_: {"bbox": {"AP": 1}},
    )
    assert "ema" in run.test(told, resume=resume)


def test_the_average_begins_with_the_weights_that_were_loaded(plan, tmp_path, monkeypatch):
    told = plan(output=tmp_path / "output")
    run.make_checkpointer(told.build_model(), str(tmp_path), told.train_sets).save("start")
    started = []
    monkeypatch.setattr(run.Trainer, "train", lambda self, *args: started.append(self))
    resets = []
    monkeypatch.setattr(run.EMA, "reset", lambda self: resets.append(weight_of(self.model)))
    monkeypatch.setattr(run.EMA, "updates", 0, raising=False)
    run.train(told._replace(weights=str(tmp_path / "start.pth")))
    expected = weights(tmp_path / "start.pth")["model"]["decoder.norm.weight"]
    assert len(resets) == 2 and torch.equal(resets[-1], expected)


def weight_of(model):
    return model.state_dict()["decoder.norm.weight"].clone()


def test_the_average_of_a_training_without_one_begins_when_it_goes_on(plan, tmp_path, monkeypatch):
    told = plan("SOLVER.EMA.ENABLED", False)
    monkeypatch.setattr(run.Trainer, "train", lambda self, *args: None)
    saved = {"trainer": make_state(told)}
    run.make_checkpointer(told.build_model(), str(tmp_path), told.train_sets, **saved).save(
        "model_1"
    )
    resets = []
    monkeypatch.setattr(run.EMA, "reset", lambda self: resets.append(weight_of(self.model)))
    monkeypatch.setattr(run.EMA, "updates", 0, raising=False)
    run.train(plan(), resume=True)
    expected = weights(tmp_path / "model_1.pth")["model"]["decoder.norm.weight"]
    assert len(resets) == 2 and torch.equal(resets[-1], expected)


def make_state(told):
    """A trainer that has done two steps."""
    model = told.build_model()
    stream = run.TrainingStream(told.build_loader, 0)
    trainer = run.Trainer(model, stream, told.build_optimizer(model))
    trainer.iter = trainer.last = 1
    return trainer


def test_weights_alone_are_no_training_to_go_on_with(plan, tmp_path):
    told = plan()
    run.make_checkpointer(told.build_model(), str(tmp_path), told.train_sets).save("model_0000003")
    with pytest.raises(CheckpointError, match="no state to resume from.*MODEL.WEIGHTS"):
        run.train(told, resume=True)


@pytest.mark.slow
def test_the_best_stays_the_best_when_a_finished_training_is_made_longer(plan, tmp_path):
    scores = iter([5.0, 5.0, 4.0])
    options = ("SOLVER.EMA.ENABLED", False, "TEST.EVAL_PERIOD", 0, "SOLVER.MAX_ITER")
    for end in (1, 2):
        told = plan(*options, end)._replace(evaluate=lambda model: {"bbox": {"AP": next(scores)}})
        run.train(told, resume=True)
    assert weights(tmp_path / "model_best.pth")["iteration"] == 0


def test_workers_that_would_begin_at_different_steps_do_not(plan, monkeypatch):
    """As where machines see different folders."""
    gather = run.comm.all_gather
    monkeypatch.setattr(
        run.comm, "all_gather", lambda x: [x, 7] if isinstance(x, int) else gather(x)
    )
    with pytest.raises(CheckpointError, match=r"iterations \[0, 7\]: all machines"):
        run.train(plan())


def test_periods_of_zero_are_the_end_alone(plan, tmp_path):
    options = ("SOLVER.CHECKPOINT_PERIOD", 0, "TEST.EVAL_PERIOD", 0, "SOLVER.MAX_ITER", 2)
    run.train(plan(*options)._replace(log_period=0, test_sets=(), evaluate=lambda *_: {}))
    assert {x.name for x in tmp_path.glob("*.pth")} == {"model_0000001.pth", "model_final.pth"}


def test_a_training_that_is_over_leaves_memory(plan, monkeypatch):
    models = []
    build = plan().build_model
    told = plan("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    told = told._replace(
        build_model=lambda: models.append(weakref.ref(x := build())) or x,
        evaluate=lambda *_: {},
    )
    gc.collect()
    gc.disable()
    try:
        run.train(told)
        assert models[0]() is None
    finally:
        gc.enable()


def test_a_frozen_backbone_stays_as_it_was_and_the_rest_learns(plan, tmp_path):
    """Statistics of its batch norms, too; with a learning rate of 0 they would go on."""
    frozen = ("MODEL.BACKBONE.FREEZE_AT", 5)
    once = ("SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0, "SOLVER.WARMUP_ITERS", 0)
    told = plan(*frozen, *once, output=tmp_path / "output")
    run.make_checkpointer(told.build_model(), str(tmp_path), told.train_sets).save("start")
    told = told._replace(
        weights=str(tmp_path / "start.pth"), evaluate=lambda model: {}, test_sets=(), ema_decay=None
    )
    run.train(told)
    before, after = (
        weights(tmp_path / x)["model"] for x in ("start.pth", "output/model_final.pth")
    )
    kept = {key for key, x in before.items() if torch.equal(x, after[key])}
    assert {key for key in before if key.startswith("backbone.")} <= kept
    assert "encoder.layers.0.ffn.layers.0.weight" not in kept


@pytest.mark.parametrize("style", ["yaml", "py"])
def test_one_key_freezes_the_whole_backbone(style):
    cfg = model_zoo.get_config(f"quickstart.{style}")
    if style == "yaml":
        cfg.MODEL.BACKBONE.FREEZE_AT = 5
    else:
        cfg = LazyConfig.apply_overrides(cfg, ["model.backbone.freeze_at=5"])
    model = model_zoo.build(cfg, 3, "cpu")
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for p in model.neck.parameters())


def test_no_run_of_wandb_begins_with_weights_that_cannot_be_loaded(plan, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(run, "require_wandb", lambda: None)
    monkeypatch.setattr(run, "WandbWriter", lambda *args, **kwargs: begun.append(args))
    (tmp_path / "damaged.pth").write_bytes(b"PK")
    told = plan("WANDB.PROJECT", "cells", "MODEL.WEIGHTS", tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match="damaged"):
        run.train(told)
    assert not begun and not list(tmp_path.glob("events*"))


def test_a_disk_without_room_ends_before_training(plan, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 10_000))
    with pytest.raises(CheckpointError, match=r"about \d+ MB, but the disk of .* has 0 MB"):
        run.train(plan())


@pytest.mark.parametrize(
    ("option", "part"),
    [
        (("SOLVER.AMP.DTYPE", "float8"), "'float8'; it can be bfloat16 or float16"),
        (("SOLVER.NON_FINITE", "ignore"), "'ignore'; it can be stop or skip"),
        (("SOLVER.ACCUMULATE", 3), "2 images cannot be divided into 3"),
        (("SOLVER.ACCUMULATE", 0), "2 images cannot be divided into 0"),
        (("SOLVER.EMA.DECAY", 1.5), r"1.5; it has to be in \[0, 1\)"),
        (("SOLVER.OPTIMIZER", "sgd"), "'sgd'; it can be ADAMW or SGD"),
        (
            (
                *("SOLVER.FSDP", True, "MODEL.META_ARCHITECTURE", "RetinaNet"),
                *("SOLVER.OPTIMIZER", "ADAMW"),
            ),
            "stages of a DINO",
        ),
        (("SEED", 2**32), "4294967296; it has to be below"),
    ],
)
def test_a_value_that_is_none_is_one_sentence_before_there_are_workers(plan, option, part):
    with pytest.raises(ValueError, match=part):
        plan("SOLVER.AMP.ENABLED", True, *option)


def test_options_of_replicas_do_not_go_with_sharding():
    cfg = model_zoo.get_config("quickstart.py")
    options = ["train.fsdp=True", "train.ddp.find_unused_parameters=True"]
    with pytest.raises(ValueError, match="does not use find_unused_parameters"):
        make_plan(LazyConfig.apply_overrides(cfg, options))


@pytest.mark.parametrize("style", ["yaml", "py"])
def test_mixed_precision_of_a_config_reaches_the_trainer(style, plan, shapes):
    if style == "yaml":
        made = [plan("SOLVER.AMP.ENABLED", x, "SOLVER.AMP.DTYPE", "float16") for x in (True, False)]
        default = plan("SOLVER.AMP.ENABLED", True)
    else:
        cfg = model_zoo.get_config("quickstart.py")
        made = [
            make_plan(LazyConfig.apply_overrides(cfg, [f"train.amp.enabled={x}", dtype]))
            for x in ("True", "False")
            for dtype in ["train.amp.dtype=float16"]
        ]
        default = make_plan(
            LazyConfig.apply_overrides(
                model_zoo.get_config("quickstart.py"), ["train.amp.enabled=True"]
            )
        )
    assert [x.precision for x in (*made, default)] == [torch.float16, None, torch.bfloat16]


# ---- several workers, each a process


def start(shapes, output, *options, launcher=(), arguments=()):
    """The program; what it has said, and its exit status."""
    files = [f"{shapes}/train.json", f"{shapes}/images"]
    command = [
        *(sys.executable, *launcher, PROGRAM),
        *("--config-file", model_zoo.get_config_file("quickstart.yaml"), *arguments),
        *("--train-json", files[0], "--train-images", files[1]),
        *(*TINY, "OUTPUT_DIR", output, "TEST.EVAL_PERIOD", "0", *options),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600
    )


SPAWN = {"arguments": ["--num-gpus", "2", "--dist-url", "auto"]}
TORCHRUN = {"launcher": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
# What workers do not share: noise, and statistics of a batch.
SHARED = [
    *("MODEL.DINO.DENOISING.NAME", "", "MODEL.RESNETS.NORM", "FrozenBN"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "3", "SOLVER.WARMUP_ITERS", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)"),
]


@pytest.fixture(scope="module")
def squares(shapes, tmp_path_factory):
    """Images of one size: padding, which convolutions see, would depend on what is beside one."""
    root = tmp_path_factory.mktemp("squares")
    shutil.copytree(shapes / "images", root / "images")
    dataset = json.loads((shapes / "train.json").read_text())
    of_image = {image["id"]: image for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        image = of_image[annotation["image_id"]]
        scale = 64 / image["width"], 64 / image["height"]
        annotation["bbox"] = [x * s for x, s in zip(annotation["bbox"], scale * 2, strict=True)]
    dataset["annotations"][0].pop("area")
    for image in dataset["images"]:
        path = root / "images" / image["file_name"]
        Image.open(path).resize((64, 64)).save(path)
        image.update(width=64, height=64)
    (root / "train.json").write_text(json.dumps(dataset))
    return root


@pytest.fixture(scope="module")
def alone(squares, tmp_path_factory):
    """Losses of a training by one worker; they are of the second of three steps."""
    output = tmp_path_factory.mktemp("alone")
    result = start(squares, output, *SHARED)
    assert result.returncode == 0, result.stderr
    return losses(output)


def losses(folder):
    (last,) = (x for x in metrics(folder) if "total_loss" in x)
    return {key: x for key, x in last.items() if "loss" in key or key == "grad_norm"}


@pytest.mark.slow
def test_two_workers_train_as_one_does_and_one_goes_on(squares, alone, plan, tmp_path, caplog):
    """The same images, augmented alike, in every step: losses differ by rounding alone.

    All at once: torchrun, shards and gradients that are added up. `test_distributed.py` has them
    one by one.
    """
    options = *SHARED, "SOLVER.FSDP", "True", "SOLVER.ACCUMULATE", "2"
    result = start(squares, tmp_path, *options, **TORCHRUN)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(alone) > 6 and losses(tmp_path) == pytest.approx(alone, rel=1e-3)
    # Of the data, the console has a warning once, and the log of every worker has it.
    about = "missing or invalid areas"
    logs = [(tmp_path / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    assert [said.count(about) for said in (result.stderr, result.stdout, *logs)] == [1, 0, 1, 1]

    alone = plan(*SHARED, "SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 0)
    with caplog.at_level(logging.INFO):
        run.train(alone._replace(evaluate=lambda *_: {}), resume=True)
    assert "Starting training from iteration 3" in caplog.text


@pytest.mark.slow
def test_an_image_that_one_worker_cannot_read_ends_them_all(shapes, tmp_path):
    damaged = tmp_path / "data"
    shutil.copytree(shapes, damaged)
    dataset = json.loads((damaged / "train.json").read_text())
    first = dataset["images"][0]["file_name"]
    (damaged / "images" / first).write_bytes(b"\xff\xd8")
    dataset["annotations"][0]["area"] = None
    (damaged / "train.json").write_text(json.dumps(dataset))
    # All of them end, or this would not return.
    result = start(damaged, tmp_path / "output", "DATALOADER.NUM_WORKERS", "1", **SPAWN)
    assert result.returncode != 0
    (sentence,) = {x for x in result.stderr.splitlines() if x.startswith("train_net.py: ")}
    assert f"{first}' cannot be read" in sentence
    logs = [path.read_text() for path in (tmp_path / "output").glob("log.txt*")]
    assert sentence.removeprefix("train_net.py: ") in "".join(logs)
    # What the process that starts them has read is handed on with its warnings, and not logged.
    assert [log.count("missing or invalid areas") for log in (*logs, result.stderr)] == [1, 1, 1]
    assert "Command line arguments" in "".join(logs) and "Registered(" not in "".join(logs)


# ---- plans


def test_a_lazy_plan_evaluates_with_the_loader_and_the_evaluator_of_its_config(shapes, monkeypatch):
    name = f"{shapes}/val.json@{shapes}/images"
    register([name])
    cfg = model_zoo.get_config("quickstart.py")
    cfg = LazyConfig.apply_overrides(cfg, [f"dataloader.test.dataset.names=[{name}]"])
    monkeypatch.setattr("dino_d2.engine.evaluation.run_evaluator", lambda *parts: parts)
    told = make_plan(cfg)
    model, loader, evaluator = told.evaluate("a model")
    assert model == "a model" and len(loader.dataset) == 2
    assert isinstance(evaluator, COCOEvaluator)
    averaged = told.evaluate("a model", "ema")[2]
    folders = [Path(x._output_dir).name for x in (evaluator, averaged, told.evaluate("a model")[2])]
    assert folders == ["inference", "ema", "inference"]


def test_a_lazy_plan_evaluates_several_data_sets_one_by_one(shapes, tmp_path, monkeypatch):
    train, val = (f"{shapes}/{x}.json@{shapes}/images" for x in ("train", "val"))
    register([train, val])
    cfg = model_zoo.get_config("quickstart.py")
    names = f"dataloader.test.dataset.names=[{train},{val}]"
    cfg = LazyConfig.apply_overrides(cfg, [names, f"train.output_dir={tmp_path}"])
    monkeypatch.setattr(
        "dino_d2.engine.evaluation.run_evaluator",
        lambda model, loader, evaluator: (len(loader.dataset), evaluator._output_dir),
    )
    expected = {
        train: (5, str(tmp_path / "inference" / "ema" / "1_train")),
        val: (2, str(tmp_path / "inference" / "ema" / "2_val")),
    }
    assert make_plan(cfg).evaluate("a model", "ema") == expected
    cfg.dataloader.evaluator.dataset_name = "${dataloader.test.dataset.names[0]}"
    cfg.dataloader.evaluator = [cfg.dataloader.evaluator]
    monkeypatch.setattr(
        "dino_d2.engine.evaluation.run_evaluator",
        lambda model, loader, evaluator: (len(loader.dataset), evaluator[0]._output_dir),
    )
    assert make_plan(cfg).evaluate("a model", "ema") == expected


def test_an_evaluator_that_names_one_of_several_data_sets_is_refused(shapes):
    train, val = (f"{shapes}/{x}.json@{shapes}/images" for x in ("train", "val"))
    register([train, val])
    cfg = model_zoo.get_config("quickstart.py")
    cfg.dataloader.test.dataset.names = [train, val]
    cfg.dataloader.evaluator.dataset_name = val
    with pytest.raises(ValueError, match=f"dataset_name is '{val}' for every test set"):
        make_plan(cfg).evaluate("a model")


def test_the_name_of_a_data_set_may_stand_alone(shapes, monkeypatch):
    val = f"{shapes}/val.json@{shapes}/images"
    register([val])
    cfg = model_zoo.get_config("quickstart.py")
    cfg.dataloader.test.dataset.names = val
    cfg.dataloader.evaluator.dataset_name = val
    monkeypatch.setattr("dino_d2.engine.evaluation.run_evaluator", lambda *parts: parts)
    assert make_plan(cfg).evaluate("a model")[0] == "a model"


def test_no_evaluation_overwrites_the_files_of_another(plan, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dino_d2.engine.evaluation.run_evaluator",
        lambda model, loader, evaluator: evaluator._output_dir,
    )
    assert plan().evaluate("a model") == str(tmp_path / "inference")
    train, val = (f"{shapes}/{x}.json@{shapes}/images" for x in ("train", "val"))
    several = plan("DATASETS.TEST", f"('{train}', '{val}')").evaluate("a model", "ema")
    assert several == {
        train: str(tmp_path / "inference" / "ema" / "1_train"),
        val: str(tmp_path / "inference" / "ema" / "2_val"),
    }
