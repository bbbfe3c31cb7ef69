"""What the programs of this folder share: their arguments, and how they say what is wrong."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

# What reading a config raises: Detectron2, yacs, omegaconf and hydra have their own ways.
BAD_INPUT = (
    *(ValueError, AssertionError, KeyError, ImportError, OSError, SyntaxError, NameError),
    NotImplementedError,
    *(YAMLError, OmegaConfBaseException, OverrideParseException),
)


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model and where it runs: what `dino_d2.load` takes."""
    parser.add_argument("--config-file", required=True, help="a file, or a name of the model zoo")
    parser.add_argument("--weights", default="", help="file or URL; default: the config's")
    parser.add_argument("--device", help="cpu, cuda, mps; default: cuda if there is one")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides")


@contextmanager
def one_sentence(prog: str) -> Iterator[None]:
    """Around what reads the user's input: says what is wrong with it in one sentence, and ends.

    Raises:
        SystemExit: with that sentence
    """
    try:
        yield
    except BAD_INPUT as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        sys.exit(f"{prog}: {' '.join(map(str.strip, text.splitlines()))}")
