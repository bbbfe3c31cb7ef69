#!/usr/bin/env python3
"""Convert a data set in VOC's or YOLO's format to COCO's, which training and evaluation read.

Writes one JSON file per split, checked like training data; images are not moved. In VOC,
coordinates count from 1 and include the last pixel, and objects marked difficult become crowd
regions, which evaluation ignores. In YOLO, outlines become their boxes, and an image without a
label file has no boxes. All such decisions are counted and printed.
"""

import argparse
from pathlib import Path

from program import add_class_arguments, make_folder, make_parser, one_sentence

EPILOG = """
Examples:

VOC: Annotations/*.xml, JPEGImages and, for splits, ImageSets/Main/{train,val,trainval,test}.txt
    $ python projects/dino/convert_dataset.py voc my/VOC2012 --output my/coco

The same from a tool that counts pixels from 0:
    $ python projects/dino/convert_dataset.py voc my/cells --zero-based --output my/coco

YOLO, as Ultralytics lays it out: data.yaml (or classes.txt), images and labels
    $ python projects/dino/convert_dataset.py yolo my/shapes --output my/coco
    $ python projects/dino/convert_dataset.py yolo my/shapes/data.yaml --output my/coco

Merge two classes, and turn one into ignore regions:
    $ python projects/dino/convert_dataset.py voc my/roads --output my/coco \\
        --merge vehicle=car,truck --ignore DontCare

Then look at it, and train:
    $ python projects/dino/visualize_data.py --config-file configs/quickstart.yaml \\
        --train-json my/coco/train.json --train-images my/shapes --output look
    $ python projects/dino/train_net.py --config-file configs/quickstart.yaml \\
        --train-json my/coco/train.json --train-images my/shapes \\
        --val-json my/coco/val.json --val-images my/shapes
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EPILOG)
    parser.add_argument("format", choices=("voc", "yolo"), help="of the data set")
    parser.add_argument("dataset", type=Path, help="its folder or, for YOLO, its YAML file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument(
        "--zero-based",
        action="store_true",
        help="voc: coordinates count from 0 and are box edges, as written by many tools",
    )
    add_class_arguments(parser, "dataset")
    return parser


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argument_parser()
    args = parser.parse_args()
    if args.zero_based and args.format != "voc":
        parser.error("--zero-based is for voc")
    return parser, args


if __name__ == "__main__":  # so that --help and wrong options do not wait for the imports below
    parse()


from dino_d2.data import class_changes, from_voc, from_yolo
from dino_d2.data.classes import change_classes, require_classes
from dino_d2.data.convert import Conversion, write_json
from dino_d2.names import path_hint, plural


def convert(args: argparse.Namespace) -> tuple[Conversion, dict[str, Path]]:
    """Convert a data set; returns it, and the paths to write by split.

    Raises:
        ValueError: the data set cannot be converted, its classes cannot be changed, or a file
            already exists
    """
    if not args.dataset.exists():
        raise ValueError(f"'{args.dataset}' does not exist{path_hint(args.dataset)}")
    if args.format == "voc":
        conversion = from_voc(args.dataset, zero_based=args.zero_based)
    else:
        conversion = from_yolo(args.dataset)
    paths = {split: args.output / f"{split}.json" for split in conversion.datasets}
    for path in paths.values():
        if path.exists():
            raise ValueError(f"'{path}' exists, and is not overwritten: choose another --output")
    if changes := class_changes(args.drop, args.merge, args.ignore):
        for split, dataset in conversion.datasets.items():
            names = [x["name"] for x in dataset["categories"]]
            require_classes(changes, names, f"'{args.dataset}'")
            conversion.datasets[split], told = change_classes(dataset, changes)
            print(f"{split}: {told}")
    make_folder(args.output, "--output")
    return conversion, paths


def main() -> None:
    parser, args = parse()
    with one_sentence(parser.prog):
        conversion, paths = convert(args)
        for split, dataset in conversion.datasets.items():
            write_json(dataset, paths[split])
    for split, dataset in conversion.datasets.items():
        images, boxes = plural(len(dataset["images"]), "image"), dataset["annotations"]
        empty = len(dataset["images"]) - len({x["image_id"] for x in boxes})
        boxes = plural(len(boxes), "box")
        print(f"'{paths[split]}': {images}, {empty} of them without boxes, {boxes}")
    for text, count in conversion.notes.items():
        if count:
            print(f"  {text}: {count}")
    names = [x["name"] for x in next(iter(conversion.datasets.values()))["categories"]]
    folder = args.dataset if args.dataset.is_dir() else args.dataset.parent
    print(
        f"{plural(len(names), 'class')}: {', '.join(names)}. The folder of the images is '{folder}'"
    )


if __name__ == "__main__":
    main()
