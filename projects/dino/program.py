"""Shared arguments and error messages of the programs.

Imported first: it imports slow modules only where it uses them.
"""

import argparse
import csv
import glob
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# What Detectron2 raises for invalid configs, besides omegaconf's errors.
BAD_INPUT = (ValueError, AssertionError, KeyError, ImportError, OSError, SyntaxError, NameError)

# Detectron2 and fvcore use deprecated functions of PyTorch, which users cannot change.
warnings.filterwarnings("ignore", category=FutureWarning)


def say_interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """End with one line on Ctrl-C, also during imports, and only in the main process."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif multiprocessing.parent_process() is None:
        print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)


sys.excepthook = say_interrupted


def interrupt_main_process(number: int, frame: FrameType | None) -> None:
    """Ignore Ctrl-C in forked loader processes: the main process ends them."""
    if os.getpid() == MAIN_PROCESS:
        raise KeyboardInterrupt


MAIN_PROCESS = os.getpid()
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in the background
    signal.signal(signal.SIGINT, interrupt_main_process)


class Parser(argparse.ArgumentParser):
    """Suggests the nearest option for an unknown one.

    Options that change classes need one that names data, see `add_class_arguments`.
    """

    data_options: tuple[str, ...] = ()

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        known = [option for action in self._actions for option in action.option_strings]
        for word in takewhile("--".__ne__, sys.argv[1:] if args is None else args):
            option = word.partition("=")[0]
            if option.startswith("--") and not any(x.startswith(option) for x in known):
                near = get_close_matches(option, known)
                near = f"did you mean: {near[0]}" if near else f"available: {', '.join(known)}"
                self.error(f"unrecognized arguments: {option}; {near}")
        parsed = super().parse_args(args, namespace)
        changed = [x for x in ("drop", "merge", "ignore") if getattr(parsed, x, None)]
        if changed and not any(getattr(parsed, x) for x in self.data_options):
            options = " or ".join("--" + x.replace("_", "-") for x in self.data_options)
            self.error(f"--{changed[0]} changes the classes of {options}: give that as well")
        return parsed


def make_parser(description: str, examples: str) -> Parser:
    """A parser with a one-sentence description and examples at the end of `--help`."""
    return Parser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for the model and its device, as of `dino_d2.load`."""
    parser.add_argument(
        "--config-file",
        default="",
        metavar="CONFIG",
        help="a file, the output folder of a training run or, with its published weights, a name "
        "of the model zoo: dino_R_50_4scale_12ep, detrex/dino_R_50_4scale_24ep",
    )
    parser.add_argument(
        "--weights",
        default="",
        help="file, URL or dino_d2://NAME; default: the config's. A checkpoint of train_net.py "
        "needs no config",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: cuda if there is one")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="config overrides, after all other options: KEY VALUE ... for a YAML file, "
        "KEY=VALUE ... for a .py file",
    )


def class_list(text: str) -> list[str]:
    """The `type` of an option that names classes: 'a, "b, with a comma"'."""
    names = next(csv.reader([text], skipinitialspace=True), [])
    if not all(name.strip() for name in names) or not names:
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name: write CLASS,CLASS")
    return names


def merged_classes(text: str) -> tuple[str, list[str]]:
    """The `type` of an option that names classes and what they become: NEW=CLASS,CLASS."""
    new, _, old = text.partition("=")
    if not new.strip() or not old:
        raise argparse.ArgumentTypeError(f"{text!r} is not NEW=CLASS,CLASS")
    return new.strip(), class_list(old)


def add_class_arguments(parser: Parser, *data_options: str) -> None:
    """Options that change the classes of data.

    Args:
        data_options: the options that name this data, as attributes
    """
    parser.data_options = data_options
    add = parser.add_argument
    many: dict[str, Any] = {"action": "extend", "default": [], "metavar": "CLASS,CLASS"}
    add("--drop", type=class_list, **many, help="classes to remove with their boxes")
    add(
        "--merge",
        type=merged_classes,
        action="append",
        default=[],
        metavar="NEW=CLASS,CLASS",
        help="merge classes into one; may be given several times",
    )
    what = "classes whose boxes become regions in which evaluation ignores detections"
    add("--ignore", type=class_list, **many, help=what)


def add_data_arguments(
    parser: Parser,
    split: str = "val",
    among: argparse._ActionsContainer | None = None,
    files: Sequence[str] = ("annotations",),
) -> None:
    """An option for a folder of data, in place of files in COCO's format, and for its classes.

    Args:
        split: the default split
        among: a group of arguments that exclude each other
        files: attributes of the options for these files
    """
    what = "a data set as annotation tools export it: COCO, YOLO, VOC"
    (among or parser).add_argument("--data", metavar="FOLDER", help=what)
    splits, about = ("train", "val", "test"), f"of --data; default: {split}"
    parser.add_argument("--split", choices=splits, default=split, help=about)
    add_class_arguments(parser, "data", *files)


def data_of(args: argparse.Namespace, json_file: Any = None, image_root: Any = None) -> str:
    """The dataset name for the options of `add_data_arguments`; prints what --data is.

    Args:
        json_file, image_root: annotations and images that are used without --data

    Raises:
        DatasetError: the folder is not a known kind of data set, or has no such split, or the
            classes to change are unknown
    """
    from dino_d2.data import changes_of, class_changes, find_folder, register
    from dino_d2.data.coco_json import dataset_name

    if args.data:
        print(find_folder(os.path.expanduser(args.data)))
        name = f"{args.data}@{args.split}"
    else:
        name = dataset_name(json_file, image_root)
    register([name := class_changes(args.drop, args.merge, args.ignore).add_to(name)])
    for told in changes_of(name):
        print(told)
    return name


# Options in place of keys of the config, see `dino_d2.config.styles.SHORT`: type and help.
SHORT: dict[str, tuple[Callable, str]] = {
    "epochs": (float, "length of training: SOLVER.EPOCHS, train.epochs"),
    "batch-size": (
        int,
        "over all workers: SOLVER.IMS_PER_BATCH, dataloader.train.total_batch_size",
    ),
    "lr": (float, "learning rate: SOLVER.BASE_LR, optimizer.lr"),
    "device": (str, "cpu, cuda, mps: MODEL.DEVICE, train.device; default: the GPU if there is one"),
    "output": (str, "folder for results: OUTPUT_DIR, train.output_dir"),
}


def add_training_arguments(parser: Parser) -> None:
    """Detectron2's training options, and options for the data."""
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="a file, or a name of the model zoo")
    add(
        "--resume", action="store_true", help="resume from the last checkpoint in the output folder"
    )
    add(
        "--overwrite",
        action="store_true",
        help="remove the files of an earlier training run from the output folder",
    )
    add("--eval-only", action="store_true", help="evaluate without training")
    add(
        "--data", metavar="FOLDER", help="a data set as annotation tools export it: COCO, YOLO, VOC"
    )
    add_class_arguments(parser, "data", "train_json", "val_json")
    for split in ("train", "val"):
        add(f"--{split}-json", metavar="FILE", help="annotations, COCO format")
        add(f"--{split}-images", metavar="FOLDER", help="where its images are")
    for option, (kind, what) in SHORT.items():
        add(f"--{option}", type=kind, help=what)
    add("--size", type=int, help="short side of images; other sizes are scaled with it")
    add("--num-gpus", type=int, default=1, help="workers of *each machine*; default: 1")
    add("--num-machines", type=int, default=1, help="default: 1")
    add("--machine-rank", type=int, default=0, help="of this machine, from 0 on; default: 0")
    # Detectron2's default collides for several runs of a user.
    add("--dist-url", default="auto", help="of the first machine, as tcp://HOST:PORT")
    add(
        "opts",
        nargs=argparse.REMAINDER,
        help="config overrides, after all options: KEY VALUE ... for a YAML file, KEY=VALUE ... "
        "for a .py file",
    )


def positive(text: str) -> int:
    """The `type` of an option that is an integer of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def require_model(predictor: Any) -> None:
    """Raise a ValueError for an exported file, which is not a model any more."""
    from dino_d2.export import ExportedModel

    if isinstance(predictor.model, ExportedModel):
        raise ValueError("an exported file can only detect (demo.py): name the checkpoint it is of")


def score(text: str) -> float:
    """The `type` of an option that is a score from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a score: give a number between 0 and 1")
    return value


def find_files(inputs: Sequence[str], suffixes: Set[str], option: str) -> list[Path]:
    """The files of paths, folders and patterns, each once, sorted within each.

    Args:
        inputs: an existing file is taken whatever its suffix, and before a pattern
        suffixes: of the files in folders and patterns, in lower case, such as ".png"
        option: name of the option for messages, such as "--images"

    Raises:
        FileNotFoundError: an input matches no file; suggests the nearest
    """
    from dino_d2.names import path_hint

    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_file():
            found.append(path)
            continue
        inside = path.iterdir() if path.is_dir() else map(Path, glob.glob(name, recursive=True))
        files = sorted(x for x in inside if x.suffix.lower() in suffixes and x.is_file())
        if not files:
            endings = (
                f", nor a folder or pattern of files that end in {', '.join(sorted(suffixes))}"
            )
            raise FileNotFoundError(f"{option} '{name}' is not a file{path_hint(name) or endings}")
        found += files
    return list(dict.fromkeys(found))


def make_folder(path: Path, what: str) -> None:
    """Create a folder and its parents, and check that it is writable.

    Args:
        what: its name in messages, such as "--output"

    Raises:
        ValueError: it cannot be created, or is not writable
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(
            f"{what} '{path}' is not writable ({reason}): choose another folder"
        ) from error


@contextmanager
def interruptible(prog: str, before: str = "everything was written") -> Iterator[None]:
    """End a program with a sentence on Ctrl-C.

    Args:
        before: what had not happened yet, for the sentence

    Raises:
        SystemExit: with that sentence
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"{prog}: interrupted before {before}")


@contextmanager
def one_sentence(prog: str) -> Iterator[None]:
    """Report errors in the user's input in one sentence, and end.

    Raises:
        SystemExit: with that sentence
    """
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except OmegaConfBaseException as error:  # further lines describe omegaconf's objects
        place = f" (key '{error.full_key}')" if error.full_key else ""
        sys.exit(f"{prog}: the config cannot be used: {str(error).splitlines()[0]}{place}")
    except BAD_INPUT as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        sys.exit(f"{prog}: {' '.join(text.split())}")
