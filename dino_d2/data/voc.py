"""Reads PASCAL VOC: a folder of XML files, one per image."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..errors import DatasetError
from ..images import image_size
from .convert import Conversion, LabelledBox, LabelledImage, find_images, read_text, to_coco
from .normalise import to_box

SPLITS = ("train", "val", "trainval", "test")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    name: str
    corners: tuple[float, ...]  # xmin, ymin, xmax, ymax as written
    difficult: bool
    where: str


class VocFile(NamedTuple):
    path: Path
    image: str  # file name of the image
    size: tuple[int, int]  # width and height as written; 0 if missing
    objects: list[VocObject]


def from_voc(root: Path, *, zero_based: bool | None = False) -> Conversion:
    """Convert a folder with `Annotations/*.xml` and `JPEGImages` to COCO annotations.

    Without such folders, XML files are read from the folder itself (or from `annotations`) and
    images from anywhere below it. Splits are the lists train, val, trainval and test in
    `ImageSets/Main/*.txt`; without any, all images are one split "all". Classes are sorted by name.

    VOC counts pixels from 1 and a box includes its last pixel, so a box is from xmin - 1 to xmax.
    Objects marked `difficult` become crowd regions: training skips them, and evaluation ignores
    them as VOC's does (but COCO's compares with the share of a detection inside, not with the IoU).
    Parts of objects, poses and other attributes are dropped.

    Args:
        root: the folder
        zero_based: coordinates are edges counted from 0, as some tools write them; None: zero-based
            if any is below 1, which is reported

    Raises:
        DatasetError: a file is missing or invalid; the message says which, where and how
    """
    xml_folder = _first_folder(root / "Annotations", root / "annotations", root)
    image_folder = _first_folder(root / "JPEGImages", root)
    paths = sorted(xml_folder.glob("*.xml"))
    if not paths:
        raise DatasetError(
            f"'{root}' and its folder 'Annotations' have no XML files: give the folder of a VOC "
            "data set"
        )
    files = {path.stem: read_xml(path) for path in paths}
    below = 0
    if zero_based is None:
        below = sum(min(x.corners[:2]) < 1 for file in files.values() for x in file.objects)
        zero_based = below > 0
    classes = sorted({x.name for file in files.values() for x in file.objects})
    images: dict[str, list[Path]] = {}
    for path in find_images(image_folder):
        images.setdefault(path.stem, []).append(path)
    splits = read_splits(root / "ImageSets" / "Main", files) or {"all": list(files)}
    labelled = {
        split: (label_image(files[x], images.get(x, []), classes, zero_based) for x in stems)
        for split, stems in splits.items()
    }
    conversion = to_coco(labelled, root, classes)
    used = set().union(*splits.values())
    difficult = (x.difficult for stem in used for x in files[stem].objects)
    notes = {
        "objects marked difficult, now crowd regions": sum(difficult),
        "boxes with coordinates below 1, so all are read as 0-based": below,
        "XML files in no split, left out": len(files.keys() - used),
        "images without an XML file, left out": len(images.keys() - files.keys()),
    }
    conversion.notes.update(notes)
    return conversion


def _first_folder(*folders: Path) -> Path:
    return next((x for x in folders if x.is_dir()), folders[-1])


def read_splits(folder: Path, files: dict[str, VocFile]) -> dict[str, list[str]]:
    splits = {}
    for path in filter(Path.is_file, (folder / f"{split}.txt" for split in SPLITS)):
        stems: dict[str, None] = {}  # each once, in their order
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            # In lists of one class, a flag follows the name: 1 present, -1 absent, 0 difficult.
            names = line.strip(), re.sub(r"\s+(-1|0|1)$", "", line.strip())
            if names[0]:
                stem = next((x for x in names if x in files), None)
                if stem is None:
                    raise DatasetError(
                        f"'{path}', line {number}: there is no XML file of '{names[1]}': add it, "
                        "or delete the line"
                    )
                stems[stem] = None
        splits[path.stem] = list(stems)
    return splits


class _NoDoctype(ET.TreeBuilder):
    """Refuses document types: VOC has none, and their entities can expand to any size."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise DatasetError("it declares a document type, which no VOC file needs: delete <!DOCTYPE")


def read_xml(path: Path) -> VocFile:
    """Read an XML file; raise a DatasetError if it is not an annotation of VOC."""
    try:
        root = ET.parse(path, ET.XMLParser(target=_NoDoctype())).getroot()
    except DatasetError as error:
        raise DatasetError(f"'{path}': {error}") from error
    except (ET.ParseError, OSError, LookupError, ValueError) as error:  # the last two: encodings
        raise DatasetError(f"'{path}' is not valid XML: {error}") from error
    if root.tag != "annotation":
        raise DatasetError(f"'{path}': its root is <{root.tag}>, not <annotation>, as VOC's is")
    size = _size(root, "width", path), _size(root, "height", path)
    objects = list(_objects(root, path))
    return VocFile(path, root.findtext("filename", "").strip(), size, objects)


def _size(root: ET.Element, side: str, path: Path) -> int:
    text = (root.findtext(f"size/{side}") or "0").strip()
    if not text.isdecimal():
        raise DatasetError(f"'{path}' has {side} {text!r}: give a number of pixels")
    return int(text)


def _objects(root: ET.Element, path: Path) -> Iterator[VocObject]:
    for number, element in enumerate(root.findall("object"), start=1):
        where = f"'{path}', object {number}"
        name = (element.findtext("name") or "").strip()
        if not name:
            raise DatasetError(f"{where} has no <name>: name its class")
        corners = to_box([element.findtext(f"bndbox/{key}") for key in CORNERS])
        if corners is None:
            raise DatasetError(
                f"{where} ('{name}') has no <bndbox> of four numbers: xmin, ymin, xmax and ymax"
            )
        yield VocObject(name, tuple(corners), _difficult(element, where), where)


def _difficult(element: ET.Element, where: str) -> bool:
    text = element.findtext("difficult", "").strip().lower()
    if text not in ("", "0", "1", "false", "true"):
        raise DatasetError(f"{where} has <difficult>{text}</difficult>: give 0 or 1")
    return text in ("1", "true")


def label_image(
    file: VocFile, images: list[Path], classes: list[str], zero_based: bool
) -> LabelledImage:
    """Combine annotations with their image, one of `images` with the same name but for suffixes."""
    if not images:
        raise DatasetError(
            f"'{file.path}' has no image of the same name: add it, or delete the file"
        )
    # Many tools write a wrong <filename>.
    path = next((x for x in images if x.name == file.image), images[0])
    if len(images) > 1 and path.name != file.image:
        names = " and ".join(f"'{x}'" for x in images)
        raise DatasetError(f"'{file.path}' can belong to {names}: say which in <filename>")
    size = image_size(path)
    if all(file.size) and file.size != size:
        raise DatasetError(
            f"'{file.path}': its size is {file.size[0]} x {file.size[1]}, but '{path}' has "
            f"{size[0]} x {size[1]} pixels after EXIF rotation: correct it and the boxes"
        )
    shift = 0 if zero_based else 1
    boxes = []
    for name, (left, top, right, bottom), difficult, where in file.objects:
        if min(left, top) < shift and not zero_based:
            raise DatasetError(
                f"{where} ('{name}') begins at ({left:g}, {top:g}), but VOC counts pixels from 1: "
                "if this data set counts from 0, use --data, which detects that, or "
                "convert_dataset.py voc --zero-based (zero_based=True of from_voc)"
            )
        corners = (left - shift, top - shift, right, bottom)
        boxes.append(LabelledBox(corners, classes.index(name), difficult, where))
    return LabelledImage(path, *size, boxes)
