"""This project's YAML configs in Detectron2's own scripts, trainer and predictor."""

import json
import subprocess
import sys

import layouts
import numpy as np
import pytest
import torch
from detectron2 import engine
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data.detection_utils import read_image
from detectron2.engine import AMPTrainer, DefaultPredictor
from detectron2.evaluation import inference_on_dataset
from PIL import Image

import dino_d2
from dino_d2.data import DatasetError, Mapper, generate, register
from dino_d2.engine import DefaultTrainer, scale_schedule
from dino_d2.engine.evaluator import ErrorAnalysisEvaluator
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.solver import ClippedAdamW
from dino_d2.weights import model_zoo
from dino_d2.weights.checkpointer import Checkpointer

pytestmark = pytest.mark.usefixtures("without_plots")
TINY = [
    *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(48,64)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.DINO.ENCODER_LAYERS", "1", "MODEL.DINO.DECODER_LAYERS", "1"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_BATCH", "0", "SOLVER.MAX_ITER", "2"),
    *("SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "1"),
]
# What Detectron2's tools/train_net.py calls; the lines that are not its own have a comment.
SCRIPT = """
import os
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, verify_results
from dino_d2 import add_dino_config  # ours
from dino_d2.engine import DefaultTrainer  # ours, in place of Detectron2's

class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return COCOEvaluator(dataset_name, output_dir=folder)

def main(args):
    cfg = get_cfg()
    add_dino_config(cfg)  # ours
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        result = Trainer.test(cfg, model)
        verify_results(cfg, result)
        print("evaluated:", result["bbox"]["AP"])
        return result
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()

if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, args=(args,))
"""
# Command lines, one after the other in one process: its imports take seconds.
EACH = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    generate(root, num_train=6, num_val=2)
    return root


@pytest.fixture
def options(shapes, tmp_path):
    train, val = (f"{shapes}/{x}.json@{shapes}/images" for x in ("train", "val"))
    data = ["DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{val}',)"]
    return [*TINY, *data, "OUTPUT_DIR", str(tmp_path / "output")]


@pytest.fixture
def make_cfg(options):
    def make(*others):
        cfg = get_cfg()
        dino_d2.add_dino_config(cfg)
        cfg.merge_from_file(model_zoo.get_config_file("quickstart.yaml"))
        cfg.merge_from_list([*options, *others])
        return cfg

    return make


@pytest.mark.slow
def test_detectron2s_script_goes_on_and_evaluates(make_cfg, options, tmp_path):
    script = tmp_path / "train_net.py"
    script.write_text(SCRIPT)

    def command(*words):
        config = model_zoo.get_config_file("quickstart.yaml")
        return [str(x) for x in (script, "--config-file", config, *words)]

    DefaultTrainer(make_cfg("TEST.EVAL_PERIOD", 0, "DATASETS.TEST", ())).train()
    output = tmp_path / "output"
    commands = [
        command("--resume", *options, "SOLVER.MAX_ITER", 4),
        command("--eval-only", *options, "MODEL.WEIGHTS", output / "model_final.pth"),
    ]
    words = [sys.executable, "-c", EACH, json.dumps(commands)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Starting training from iteration 2" in result.stdout
    metrics = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    (score,) = (x.split()[-1] for x in result.stdout.splitlines() if x.startswith("evaluated:"))
    assert float(score) == pytest.approx(metrics[-1]["bbox/AP"])


def test_the_trainer_is_detectron2s_with_what_a_dino_needs(make_cfg, tmp_path):
    cfg = make_cfg("SOLVER.BIAS_LR_FACTOR", 2.0)
    trainer = DefaultTrainer(cfg)
    assert isinstance(trainer, engine.DefaultTrainer) and trainer.max_iter == 2
    assert isinstance(trainer.optimizer, ClippedAdamW)
    assert trainer.optimizer.defaults["max_norm"] == 0.1
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.001, 0.002}
    assert isinstance(trainer.data_loader.dataset.dataset._map_func._obj, Mapper)
    assert isinstance(trainer.checkpointer, Checkpointer)
    (name,) = cfg.DATASETS.TEST
    evaluator = DefaultTrainer.build_evaluator(cfg, name)
    assert isinstance(evaluator, ErrorAnalysisEvaluator)
    assert evaluator._output_dir == str(tmp_path / "output" / "inference")


@pytest.mark.slow
def test_a_training_leaves_its_best_checkpoint_and_names_of_classes(make_cfg, tmp_path):
    trainer = DefaultTrainer(make_cfg("SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0))
    trainer.resume_or_load(resume=False)
    trainer.train()
    output = tmp_path / "output"
    assert (output / "inference" / "per_class.csv").is_file()
    for name in ("model_final", "model_best"):
        saved = torch.load(output / f"{name}.pth", weights_only=True)
        assert saved["dino_d2"]["classes"] == ["circle", "square", "triangle", "star"]
    longer = DefaultTrainer(make_cfg("SOLVER.MAX_ITER", 3))
    longer.resume_or_load(resume=True)
    assert longer.start_iter == 1


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_that_of_the_config(dtype, make_cfg):
    trainer = DefaultTrainer(make_cfg("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype))
    assert isinstance(trainer._trainer, AMPTrainer)
    assert trainer._trainer.precision is getattr(torch, dtype)


@pytest.mark.parametrize(
    ("others", "part"),
    [
        (("SOLVER.EMA.ENABLED", True), "SOLVER.EMA.ENABLED has no effect in Detectron2's trainer"),
        (("SOLVER.ACCUMULATE", 2), "train_net.py: leave it at 1"),
        (("WANDB.PROJECT", "cells"), "WANDB.PROJECT has no effect"),
        (("MODEL.MASK_ON", True), "MODEL.MASK_ON has no effect on a DINO"),
        (("SOLVER.REFERENCE_BATCH", 4), "REFERENCE_BATCH 4 .* not for batch size 2"),
        (("SOLVER.EPOCHS", 3), r"SOLVER.EPOCHS 3, .*scale_schedule\(cfg\) first"),
        (("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"), "ADAMW clips by 'full_model'"),
    ],
)
def test_what_this_trainer_does_not_do_is_one_sentence(others, part, make_cfg):
    with pytest.raises(ValueError, match=part):
        DefaultTrainer(make_cfg(*others))


def test_a_schedule_that_was_scaled_before_is_taken_as_it_is(make_cfg):
    cfg = make_cfg("SOLVER.REFERENCE_BATCH", 4)
    scale_schedule(cfg)
    assert DefaultTrainer(cfg).max_iter == 4


def test_what_detectron2s_trainer_does_beyond_ours_is_left_to_it(make_cfg):
    trainer = DefaultTrainer(make_cfg("TEST.PRECISE_BN.ENABLED", True))
    assert any(isinstance(hook, engine.hooks.PreciseBN) for hook in trainer._hooks)


def test_bad_data_is_one_sentence(make_cfg):
    with pytest.raises(DatasetError, match="'nowhere' is not registered"):
        DefaultTrainer(make_cfg("DATASETS.TEST", ("nowhere",)))


def test_detectron2s_own_trainer_does_not_train_with_sgd_in_silence(make_cfg, shapes):
    """Its message names the value; the page TRAINING.md says what to import instead."""
    register([f"{shapes}/train.json@{shapes}/images"])
    with pytest.raises(ValueError, match="'full_model' is not a valid GradientClipType"):
        engine.DefaultTrainer(make_cfg())


@pytest.mark.slow
def test_a_lazyconfig_trains_by_the_calls_of_detectron2s_script(shapes, tmp_path):
    names = train, val = [f"{shapes}/{x}.json@{shapes}/images" for x in ("train", "val")]
    register(names)
    cfg = LazyConfig.load(model_zoo.get_config_file("quickstart.py"))
    sets = f"dataloader.train.dataset.names=[{train}]", f"dataloader.test.dataset.names=[{val}]"
    others = "dataloader.train.total_batch_size=2", f"train.output_dir={tmp_path}"
    cfg = LazyConfig.apply_overrides(cfg, [*sets, *others])
    cfg.optimizer.params.model = model = instantiate(cfg.model)
    loader, optimizer = instantiate(cfg.dataloader.train), instantiate(cfg.optimizer)
    trainer = engine.SimpleTrainer(model, loader, optimizer)
    hooks = engine.hooks
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=False)
    trainer.train(0, 1)
    parts = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    assert "AP" in inference_on_dataset(model, *parts)["bbox"]
    assert (tmp_path / "model_final.pth").is_file()


# ---- DefaultPredictor


@pytest.mark.slow
@pytest.mark.parametrize(
    ("colours", "size"), [("RGB", (60, 90)), ("BGR", (60, 90)), ("RGB", (300, 40))]
)
def test_detectron2s_predictor_detects_what_ours_does(colours, size, make_cfg, tmp_path):
    cfg = make_cfg("MODEL.DINO.NUM_CLASSES", 4, "INPUT.FORMAT", colours)
    model = DefaultTrainer.build_model(cfg)
    with torch.no_grad():
        model.decoder.class_heads[0].weight.normal_()  # scores that differ
    weights, names = str(tmp_path / "model.pth"), ["circle", "square", "triangle", "star"]
    Checkpointer(model, str(tmp_path), classes=names).save("model")
    cfg.MODEL.WEIGHTS = weights
    (tmp_path / "config.yaml").write_text(cfg.dump())
    array = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "image.png")

    theirs = DefaultPredictor(cfg)(read_image(str(tmp_path / "image.png"), "BGR"))["instances"]
    ours = dino_d2.load(tmp_path / "config.yaml", device="cpu")(tmp_path / "image.png")
    assert len(theirs) == len(ours) > 50
    torch.testing.assert_close(theirs.scores, ours.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.pred_boxes.tensor, ours.pred_boxes.tensor, atol=1e-2, rtol=0)
    assert torch.equal(theirs.pred_classes, ours.pred_classes)
    assert theirs.image_size == ours.image_size == size


def test_detectron2s_predictor_refuses_weights_of_another_layout(make_cfg, tmp_path):
    cfg = make_cfg("MODEL.DINO.NUM_CLASSES", 4, "MODEL.WEIGHTS", f"{tmp_path}/theirs.pth")
    cfg.MODEL.DINO.QUERY_SELECTION = "MixedQuerySelection"  # as published
    state = DefaultTrainer.build_model(cfg).state_dict()
    torch.save({"model": layouts.official(state)}, tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match="load them with dino_d2.Checkpointer"):
        DefaultPredictor(cfg)


def test_detectron2s_checkpointer_reads_all_of_a_checkpoint_of_ours(make_cfg, tmp_path):
    cfg = make_cfg("MODEL.DINO.NUM_CLASSES", 4)
    model, other = DefaultTrainer.build_model(cfg), DefaultTrainer.build_model(cfg)
    Checkpointer(model, str(tmp_path), classes=list("abcd")).save("model")
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    expected = model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in other.state_dict().items())
