#!/usr/bin/env python3
"""Convert a published DINO checkpoint to this project's layout, or one of ours to the official one.

Training and evaluation read every layout as it is; converting is for keeping or sharing one. The
number of classes does not change: official DINO has COCO's 91 category ids, from which a model with
80 classes selects its own.
"""

import argparse
import os
import sys

from program import make_parser

EPILOG = """
Examples:

From official DINO, detrex or mmdetection, detected automatically:
    $ python projects/dino/convert_checkpoint.py checkpoint0011_4scale.pth dino.pth
    $ python projects/dino/convert_checkpoint.py dino_d2://detrex/dino_R_50_4scale_24ep dino.pth

Back to the layout of official DINO:
    $ python projects/dino/convert_checkpoint.py output/model_final.pth official.pth --to official

Extract the averaged weights of a training run with EMA, without the optimizer:
    $ python projects/dino/convert_checkpoint.py output/model_best.pth dino.pth --ema
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    parser.add_argument("source", help="a file, a URL or dino_d2://NAME of the model zoo")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--to", choices=("dino_d2", "official"), default="dino_d2")
    parser.add_argument("--ema", action="store_true", help="use the averaged weights")
    return parser


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    argument_parser().parse_args()


from dino_d2.layouts.adapt import count_classes
from dino_d2.layouts.dino import to_official
from dino_d2.layouts.maskdino import to_maskdino
from dino_d2.layouts.renaming import CheckpointError, State
from dino_d2.names import plural
from dino_d2.weights.files import write
from dino_d2.weights.fitting import OpenedWeights, open_weights


def convert(source: str, to: str, *, ema: bool = False) -> dict:
    """The converted checkpoint; with `ema`, of the averaged weights.

    Raises:
        CheckpointError: the file cannot be read, has an unknown format, or no averaged weights
    """
    opened = open_weights(source, averaged=ema)
    if opened.note:
        print(opened.note)
    number = count_classes(opened.state)
    if number is None:
        raise CheckpointError(f"'{source}' is not a DINO in a known format")
    classes = opened.classes(number)
    # Also for the official layout, or settings that differ from the official ones would be lost.
    description = opened.settings | {"classes": classes and list(classes)}
    state = to_official_of(opened) if to == "official" else opened.state
    return {"model": state, "dino_d2": description}


def to_official_of(opened: OpenedWeights) -> State:
    """In the layout of the authors' code, of DINO or Mask DINO."""
    if "pixel_embedding.projection.weight" not in opened.state:
        return to_official(opened.state)
    return to_maskdino(opened.state, coarsest_first=not opened.settings.get("anchor_sides"))


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    if os.path.exists(args.target):
        sys.exit(f"{parser.prog}: '{args.target}' exists, and is not overwritten")
    try:
        converted = convert(args.source, args.to, ema=args.ema)
        write(converted, args.target)
    except CheckpointError as error:
        sys.exit(f"{parser.prog}: {error}")
    number = plural(len(converted["model"]), "tensor")
    print(f"{number} are in '{args.target}', in the layout of {args.to}")


if __name__ == "__main__":
    main()
