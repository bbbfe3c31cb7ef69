"""What the programs of this folder share: their arguments, and how they say what is wrong."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

from omegaconf.errors import OmegaConfBaseException

from dino_d2.names import nearest

# What reading a config raises: Detectron2, yacs and omegaconf have their own ways.
BAD_INPUT = (
    *(ValueError, AssertionError, KeyError, ImportError, OSError, SyntaxError, NameError),
    OmegaConfBaseException,
)


class Parser(argparse.ArgumentParser):
    """Names the nearest option where one is unknown."""

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        known = [option for action in self._actions for option in action.option_strings]
        for word in takewhile("--".__ne__, sys.argv[1:] if args is None else args):
            option = word.partition("=")[0]
            if option.startswith("--") and not any(x.startswith(option) for x in known):
                near = nearest(option, known) or known
                self.error(f"unrecognized arguments: {option}; the nearest: {', '.join(near)}")
        return super().parse_args(args, namespace)


def make_parser(
    description: str, examples: str, parents: Sequence[argparse.ArgumentParser] = ()
) -> Parser:
    """
    Args:
        description: one sentence
        examples: what `--help` ends with, as it is written
        parents: parsers whose arguments this one has, too
    """
    return Parser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents,
        add_help=not parents,  # theirs is inherited
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model and where it runs: what `dino_d2.load` takes."""
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="CONFIG",
        help="a file or, with its published weights, a name of the model zoo: "
        "dino_R_50_4scale_12ep, detrex/dino_R_50_4scale_24ep",
    )
    parser.add_argument(
        "--weights", default="", help="file, URL or dino_d2://NAME; default: the config's"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: cuda if there is one")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="changes of the config, the last of all options: KEY VALUE ... for a YAML file, "
        "KEY=VALUE ... for a .py file",
    )


@contextmanager
def one_sentence(prog: str) -> Iterator[None]:
    """Around what reads the user's input: says what is wrong with it in one sentence, and ends.

    Raises:
        SystemExit: with that sentence
    """
    try:
        yield
    except OmegaConfBaseException as error:  # its other lines describe its objects
        place = f" (key '{error.full_key}')" if error.full_key else ""
        sys.exit(f"{prog}: the config cannot be used: {str(error).splitlines()[0]}{place}")
    except BAD_INPUT as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        sys.exit(f"{prog}: {' '.join(text.split())}")
