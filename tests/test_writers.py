"""Weights & Biases beside Detectron2's own writers: without it, with a pretended and a real one."""

import importlib.util
import json
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from detectron2.config import LazyConfig
from detectron2.engine import TrainerBase, hooks
from detectron2.utils.events import EventStorage, JSONWriter

from dino_d2.data import generate
from dino_d2.engine import run
from dino_d2.engine.plan import make_plan
from dino_d2.engine.writers import WandbWriter, plain_config
from dino_d2.weights import model_zoo


class Run:
    """What a writer calls, remembered."""

    def __init__(self, options):
        self.options, self.logged, self.finished, self.fault = options, [], [], None

    def log(self, scalars, step):
        if self.fault:
            raise self.fault
        self.logged.append((step, dict(scalars)))

    def finish(self, exit_code):
        if self.fault:
            raise self.fault
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    """A module that can be without access; `runs` are those that were started."""
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.runs, module.has_access = [], True
    module.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))

    def init(**options):
        if not module.has_access and options.get("mode") != "offline":
            raise module.errors.Error("No API key\nconfigured.")
        module.runs.append(Run(options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_NAME", raising=False)
    return module


def writer(folder, resume=False, **config):
    return WandbWriter("cells", str(folder), config=config, resume=resume)


def plan_of(style, batch=4, parts=1):
    cfg = model_zoo.get_config(f"quickstart.{style}")
    values = {
        "yaml": {
            "WANDB.PROJECT": "cells",
            "SOLVER.IMS_PER_BATCH": batch,
            "SOLVER.ACCUMULATE": parts,
        },
        "py": {
            "train.wandb_project": "cells",
            "dataloader.train.total_batch_size": batch,
            "train.accumulate": parts,
        },
    }[style]
    if style == "py":
        cfg = LazyConfig.apply_overrides(cfg, [f"{key}={x}" for key, x in values.items()])
    else:
        cfg.merge_from_list([x for pair in values.items() for x in pair])
    return make_plan(cfg)


def test_a_number_is_sent_once_with_its_iteration(wandb, tmp_path):
    sends = writer(tmp_path)
    with EventStorage(7) as storage:
        storage.put_scalar("loss", 2.0)
        sends.write()
        sends.write()
        storage.iter = 9
        storage.put_scalar("bbox/AP", 50.0, smoothing_hint=False)
        sends.write()
    assert wandb.runs[0].logged == [(7, {"loss": 2.0}), (9, {"bbox/AP": 50.0})]


def test_numbers_of_different_iterations_come_in_order(wandb, tmp_path):
    sends = writer(tmp_path)
    with EventStorage(4) as storage:
        storage.put_scalar("late", 1.0)
        storage.iter = 2
        storage.put_scalar("early", 1.0)
        sends.write()
    assert [step for step, _ in wandb.runs[0].logged] == [2, 4]


def test_what_is_sent_is_what_metrics_json_has(wandb, tmp_path):
    writers = [writer(tmp_path), JSONWriter(str(tmp_path / "metrics.json"))]
    with EventStorage() as storage:
        for value in (1.0, 5.0, 2.0):
            storage.iter += 1
            storage.put_scalars(loss=value)
            storage.put_scalar("lr", value, smoothing_hint=False)
        for each in writers:
            each.write()
            each.close()
    written = json.loads((tmp_path / "metrics.json").read_text())
    ((step, sent),) = wandb.runs[0].logged
    assert {"iteration": step, **sent} == written == {"iteration": 3, "loss": 2.0, "lr": 2.0}


def test_a_run_has_the_config_and_the_name_of_its_folder(wandb, tmp_path):
    writer(tmp_path, lr=0.1)
    options = wandb.runs[0].options
    assert options["config"] == {"lr": 0.1}
    assert (options["project"], options["name"]) == ("cells", tmp_path.name)


def test_the_environment_names_a_run(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_NAME", "twelfth")
    writer(tmp_path)
    assert wandb.runs[0].options["name"] == "twelfth"


def test_a_training_that_goes_on_goes_on_with_its_run(wandb, tmp_path):
    for resume in (True, True, False):  # nothing to go on with; the same again; a new one
        writer(tmp_path, resume)
    first, again, new = [x.options["id"] for x in wandb.runs]
    assert first == again != new and wandb.runs[1].options["resume"] == "allow"


def test_without_access_the_run_stays_on_the_disk_with_a_sentence(wandb, tmp_path, caplog):
    wandb.has_access = False
    with caplog.at_level(logging.WARNING, "dino_d2"):
        writer(tmp_path)
    assert wandb.runs[0].options["mode"] == "offline"
    assert f"(No API key configured.): the run is written to '{tmp_path}/wandb'" in caplog.text


@pytest.mark.parametrize("breaks_in", ["write", "close"])
def test_a_training_survives_the_death_of_wandb(wandb, tmp_path, caplog, breaks_in):
    sends = writer(tmp_path)
    wandb.runs[0].fault = ConnectionResetError("Connection lost")
    with EventStorage() as storage, caplog.at_level(logging.WARNING, "dino_d2"):
        storage.put_scalar("loss", 1.0)
        for call in (sends.write, sends.close) if breaks_in == "write" else (sends.close,):
            call()
    assert caplog.text.count("has stopped (Connection lost)") == 1


def test_a_mistake_in_what_is_sent_is_not_hidden(wandb, tmp_path):
    sends = writer(tmp_path)
    wandb.runs[0].fault = TypeError("no number")
    with EventStorage() as storage, pytest.raises(TypeError):
        storage.put_scalar("loss", 1.0)
        sends.write()


@pytest.mark.parametrize("fails", [False, True])
def test_a_training_that_fails_is_a_run_that_failed(wandb, tmp_path, fails):
    class Loop(TrainerBase):
        def run_step(self):
            if fails:
                raise FloatingPointError

    loop = Loop()
    loop.register_hooks([hooks.PeriodicWriter([writer(tmp_path)])])
    try:
        loop.train(0, 2)
    except FloatingPointError:
        assert fails
    assert wandb.runs[0].finished == [int(fails)]


@pytest.mark.parametrize("style", ["yaml", "py"])
def test_a_project_in_the_config_adds_a_writer_to_those_of_detectron2(wandb, tmp_path, style):
    plan = plan_of(style)._replace(output_dir=str(tmp_path))
    writers = run.make_writers(plan, goes_on=False)
    assert [type(x).__name__ for x in writers] == [
        *("CommonMetricPrinter", "JSONWriter", "TensorboardXWriter", "WandbWriter")
    ]
    assert wandb.runs[0].options["config"] == plan.config


@pytest.mark.parametrize("style", ["yaml", "py"])
def test_the_batch_of_a_run_is_that_of_a_step_not_of_a_part_of_it(style):
    config = plan_of(style, batch=16, parts=4).config
    if style == "yaml":
        assert config["SOLVER"]["IMS_PER_BATCH"] == 16
    else:
        assert config["dataloader"]["train"]["total_batch_size"] == 16


@pytest.mark.parametrize("style", ["yaml", "py"])
def test_by_default_there_is_no_project(style, tmp_path):
    cfg = model_zoo.get_config(f"quickstart.{style}")
    plan = make_plan(cfg)._replace(output_dir=str(tmp_path))
    assert len(run.make_writers(plan, goes_on=False)) == 3


def test_a_missing_package_is_one_sentence_before_training_and_no_matter_otherwise(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plan = plan_of("yaml")._replace(build_model=lambda: pytest.fail("it has begun"))
    with pytest.raises(ValueError, match="wandb is not installed: `pip install wandb`"):
        run.train(plan)


def test_configs_of_both_styles_become_plain_values():
    yaml, lazy = (plain_config(model_zoo.get_config(f"quickstart.{x}")) for x in ("yaml", "py"))
    assert yaml["SOLVER"]["BASE_LR"] == lazy["optimizer"]["lr"] == 0.001
    assert yaml["INPUT"]["MIN_SIZE_TRAIN"] == [96, 104, 112]
    assert lazy["model"]["_target_"] == "DINO" and lazy["train"]["epochs"] is None
    assert lazy["model"]["neck"]["input_shape"]["res3"]["channels"] == 128
    for config in (yaml, lazy):
        json.dumps(config)


@pytest.mark.slow
def test_real_wandb_keeps_an_offline_run_and_goes_on_with_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    generate(tmp_path, num_train=2, num_val=1)
    cfg = model_zoo.get_config("quickstart")
    name = f"{tmp_path}/train.json@{tmp_path}/images"
    options = ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"]
    options += ["OUTPUT_DIR", str(tmp_path), "INPUT.MIN_SIZE_TRAIN", "(48,)"]
    cfg.merge_from_list([*options, "WANDB.PROJECT", "cells", "SOLVER.IMS_PER_BATCH", "1"])
    ended = []  # what W&B itself has of a run at its end
    close = WandbWriter.close

    def remember(writer):
        ended.append((dict(writer.run.summary), dict(writer.run.config)))
        close(writer)

    monkeypatch.setattr(WandbWriter, "close", remember)
    for end in (2, 4):  # W&B tells what it has of a step when the next has come
        cfg.SOLVER.MAX_ITER = end
        run.train(make_plan(cfg)._replace(log_period=1), resume=True)

    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    identity = (tmp_path / "wandb_id").read_text()
    assert [x.stem for x in files] == [f"run-{identity}"] * 2
    assert all({"total_loss", "loss_class_enc"} <= summary.keys() for summary, _ in ended)
    assert [config["SOLVER"]["MAX_ITER"] for _, config in ended] == [2, 4]
    assert (tmp_path / "metrics.json").is_file()
