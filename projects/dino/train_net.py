#!/usr/bin/env python3
"""Train and evaluate DINO with Detectron2, from a YAML or a LazyConfig file."""

import argparse
import os
import sys
import weakref
from collections.abc import Sequence

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from hydra.errors import OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dino_d2 import DINO, data
from dino_d2.checkpoint import CheckpointError
from dino_d2.checkpoint_io import fetch
from dino_d2.checkpointer import Checkpointer
from dino_d2.config import read_config
from dino_d2.solver import ClippedAdamW, parameter_groups

EPILOG = """
Examples:

Train on COCO, found where DETECTRON2_DATASETS points, with 8 GPUs:
    $ train_net.py --config-file configs/dino_R_50_4scale_12ep.yaml --num-gpus 8

Train on data of one's own, in COCO format; works with .py configs too:
    $ train_net.py --config-file configs/dino_R_50_4scale_12ep.yaml \\
        --train-json my/train.json --train-images my/images \\
        --val-json my/val.json --val-images my/images

Change the config at the end of the command, YAML and LazyConfig:
    $ train_net.py --config-file configs/quickstart.yaml SOLVER.BASE_LR 0.001 OUTPUT_DIR out
    $ train_net.py --config-file configs/quickstart.py optimizer.lr=0.001 train.output_dir=out

Evaluate a checkpoint, of one's own or a published one; go on with an interrupted training:
    $ train_net.py --config-file ... --eval-only MODEL.WEIGHTS out/model_final.pth
    $ train_net.py --config-file ... --eval-only MODEL.WEIGHTS dino_d2://detrex/dino_R_50_4scale_24ep
    $ train_net.py --config-file ... --resume
"""

# What reading a config raises: Detectron2, yacs, omegaconf and hydra have their own ways.
BAD_INPUT = (
    *(ValueError, AssertionError, KeyError, ImportError, OSError, SyntaxError, NameError),
    *(YAMLError, OmegaConfBaseException, OverrideParseException),
)


class Trainer(DefaultTrainer):
    """Detectron2's trainer for YAML configs, with DINO's optimizer, augmentation and weights."""

    def build_hooks(self) -> list:
        # Before the hook that saves takes hold of it.
        self.checkpointer = make_checkpointer(
            self.model, self.cfg.OUTPUT_DIR, self.cfg.DATASETS.TRAIN, trainer=weakref.proxy(self)
        )
        return super().build_hooks()

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        augmentations = data.detr_augmentation(
            min_sizes=cfg.INPUT.MIN_SIZE_TRAIN,
            max_size=cfg.INPUT.MAX_SIZE_TRAIN,
            crop_min_sizes=cfg.INPUT.CROP.MIN_SIZE_TRAIN,
            crop_size=cfg.INPUT.CROP.SIZE if cfg.INPUT.CROP.ENABLED else None,
            flip=cfg.INPUT.RANDOM_FLIP,
        )
        mapper = DatasetMapper(cfg, is_train=True, augmentations=augmentations)
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
        if solver.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        groups = parameter_groups(
            model,
            lr=solver.BASE_LR,
            backbone_multiplier=solver.BACKBONE_MULTIPLIER,
            offsets_multiplier=solver.OFFSETS_MULTIPLIER,
        )
        return ClippedAdamW(
            groups,
            max_norm=clip.CLIP_VALUE if clip.ENABLED else 0,
            lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
        )


def load_config(args: argparse.Namespace) -> CfgNode | DictConfig:
    """The config of either style, with the command line merged in and its data checked.

    Raises:
        ValueError: the config, the data or the machine cannot do what is asked for
    """
    if "://" not in args.config_file and not os.path.isfile(args.config_file):
        raise ValueError(f"--config-file is {args.config_file!r}, which is no file")
    if not args.config_file.endswith((".yaml", ".yml", ".py")):
        raise ValueError(f"--config-file is {args.config_file!r}, neither a .yaml nor a .py file")
    cfg = read_config(args.config_file)
    return load_yaml(cfg, args) if isinstance(cfg, CfgNode) else load_lazy(cfg, args)


def load_yaml(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    cfg.merge_from_list(args.opts)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = datasets(args, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    is_dino = cfg.MODEL.META_ARCHITECTURE == "DINO"
    num_classes = cfg.MODEL.DINO.NUM_CLASSES if is_dino else None
    # Written down: the config that is saved with the results builds the model without the data.
    cfg.MODEL.DINO.NUM_CLASSES = check_data(
        args, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, num_classes
    )
    check_device(cfg.MODEL.DEVICE, "MODEL.DEVICE cpu")
    check_weights(args, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if cfg.SOLVER.OPTIMIZER == "ADAMW" and clip.ENABLED and clip.CLIP_TYPE != "full_model":
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; ADAMW clips by 'full_model'"
        )
    cfg.freeze()
    return cfg


def load_lazy(cfg: DictConfig, args: argparse.Namespace) -> DictConfig:
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    train, test = cfg.dataloader.train.dataset, cfg.dataloader.test.dataset
    train.names, test.names = datasets(args, train.names, test.names)
    number = cfg.model.num_classes if isinstance(cfg.model.num_classes, int) else None
    cfg.model.num_classes = check_data(args, train.names, test.names, number)
    check_device(cfg.train.device, "train.device=cpu")
    check_weights(args, cfg.train.init_checkpoint, "train.init_checkpoint")
    if len(test.names) > 1:
        raise ValueError(f"a LazyConfig evaluates on one data set, not on {list(test.names)}")
    if not test.names:
        del cfg.dataloader.evaluator
    return cfg


def datasets(
    args: argparse.Namespace, train: Sequence[str], test: Sequence[str]
) -> tuple[Sequence[str], Sequence[str]]:
    """Names of the data sets to train and to evaluate on: the config's, unless the command line
    has files."""
    if args.train_json or args.val_json:
        pairs = (args.train_json, args.train_images), (args.val_json, args.val_images)
        train, test = ([f"{file}@{images}"] if file else [] for file, images in pairs)
    return train, test


def check_data(
    args: argparse.Namespace, train: Sequence[str], test: Sequence[str], num_classes: int | None
) -> int:
    """The number of classes of the data that is to be used, checked as `data.check` does."""
    if args.eval_only:  # needs nothing of the training data
        train = ()
    if not (test if args.eval_only else train):
        split = "val" if args.eval_only else "train"
        raise ValueError(f"there is no data: give --{split}-json and --{split}-images")
    return data.check(train, test, num_classes)


def check_weights(args: argparse.Namespace, path: str, key: str) -> None:
    if args.eval_only and not path and not args.resume:
        raise ValueError(f"--eval-only needs a checkpoint: name one as {key}")
    if path and not args.resume:
        try:
            fetch(path)
        except CheckpointError as error:
            raise ValueError(f"{key}: {error}") from error


def check_device(device: str, remedy: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"PyTorch finds no GPU here; end the command with {remedy} to do without")


def main(args: argparse.Namespace) -> None:
    """Train or evaluate; one process of `launch`. Results are in the output folder."""
    cfg = load_config(args)
    default_setup(cfg, args)
    is_yaml = isinstance(cfg, CfgNode)
    output_dir = cfg.OUTPUT_DIR if is_yaml else cfg.train.output_dir
    setup_logger(output_dir, distributed_rank=comm.get_rank(), name="dino_d2")
    (run_yaml if is_yaml else run_lazy)(cfg, args)


def make_checkpointer(
    model: torch.nn.Module, output_dir: str, names: Sequence[str], **options
) -> DetectionCheckpointer:
    """For a model of the classes of the given data sets; `options` as of Checkpointer."""
    if isinstance(getattr(model, "module", model), DINO):
        return Checkpointer(model, output_dir, classes=data.class_names(names), **options)
    options.pop("complete", None)
    return DetectionCheckpointer(model, output_dir, **options)


def run_yaml(cfg: CfgNode, args: argparse.Namespace) -> None:
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = make_checkpointer(model, cfg.OUTPUT_DIR, cfg.DATASETS.TEST, complete=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        Trainer.test(cfg, model)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def run_lazy(cfg: DictConfig, args: argparse.Namespace) -> None:
    """As tools/lazyconfig_train_net.py of Detectron2."""
    model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        names = cfg.dataloader.test.dataset.names
        checkpointer = make_checkpointer(model, cfg.train.output_dir, names, complete=True)
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        evaluate_lazy(cfg, model)
        return
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    names = cfg.dataloader.train.dataset.names
    checkpointer = make_checkpointer(model, cfg.train.output_dir, names, trainer=trainer)
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
    is_main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_main else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate_lazy(cfg, model)),
            hooks.PeriodicWriter(writers, cfg.train.log_period) if is_main else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    goes_on = args.resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if goes_on else 0, cfg.train.max_iter)


def evaluate_lazy(cfg: DictConfig, model: torch.nn.Module) -> dict:
    if "evaluator" not in cfg.dataloader:
        return {}
    evaluator = instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    print_csv_format(results)
    return results


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's parser, with a data set of one's own."""
    parser = default_argument_parser(EPILOG)
    parser.description = __doc__
    for split in ("train", "val"):
        parser.add_argument(f"--{split}-json", metavar="FILE", help="annotations, COCO format")
        parser.add_argument(f"--{split}-images", metavar="FOLDER", help="where its images are")
    return parser


def invoke_main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    for split in ("train", "val"):
        if bool(getattr(args, f"{split}_json")) != bool(getattr(args, f"{split}_images")):
            parser.error(f"--{split}-json and --{split}-images go together")
    try:
        load_config(args)  # bad input ends here, before there are several processes
    except BAD_INPUT as error:
        sys.exit(f"{parser.prog}: {error.args[0] if isinstance(error, KeyError) else error}")
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except CheckpointError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    invoke_main()
