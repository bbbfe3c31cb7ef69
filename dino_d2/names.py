"""What people name - keys, files, devices - and what comes nearest to a name that is unknown."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from heapq import nlargest
from itertools import pairwise
from pathlib import Path

import torch

MAX_COMPARED = 1000  # exactly, which takes 20 microseconds a name
MAX_LISTED = 40


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names, the most similar first; upper and lower case are one."""
    known = list(known)
    name, candidates = name.lower(), list({x.lower() for x in known})
    if len(candidates) > MAX_COMPARED:  # as the files of COCO are: those with most pairs in common
        pairs = set(pairwise(name))
        candidates = nlargest(
            MAX_COMPARED, candidates, lambda x: len(pairs.intersection(pairwise(x)))
        )
    matches = get_close_matches(name, candidates)
    return [x for match in matches for x in known if x.lower() == match][:3]


def hint(name: str, known: Iterable[str]) -> str:
    """The end of a sentence on an unknown name: the nearest or, if none is near, what there is."""
    known = list(known)
    if near := nearest(name, known):
        return f"the nearest: {', '.join(near)}"
    more = len(known) - MAX_LISTED
    listed = ", ".join(known[:MAX_LISTED]) or "none"
    return f"there are: {listed}" + (f" and {more} more" if more > 0 else "")


def nearest_path(path: str) -> str:
    """The file or folder whose path is most similar, each part by itself; "" if none is."""
    found = Path()
    for part in Path(path).expanduser().parts:
        if not (found / part).exists():
            there = (x.name for x in found.iterdir() if x.exists()) if found.is_dir() else ()
            names = nearest(part, there)
            if not names:
                return ""
            part = names[0]
        found /= part
    return str(found)


def plural(number: int, noun: str) -> str:
    """A number of things: 1 box, 2 boxes, 1,000 boxes.

    Args:
        number: of them
        noun: what one of them is called, of which the last word is counted
    """
    if number == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{number:,} {noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}s"


def path_hint(path: str | os.PathLike[str]) -> str:
    """The end of a sentence on a path that does not exist: where a link points, or the nearest, or
    "" if there is none."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"; it is a link to '{os.readlink(path)}', which is not there"
    near = "" if os.path.exists(path) else nearest_path(os.fspath(path))
    return f"; the nearest: '{near}'" if near else ""


def check_device(name: str) -> None:
    """
    Args:
        name: as PyTorch has it: "cpu", "cuda:1"

    Raises:
        ValueError: PyTorch does not know it, or finds no such device here
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"the device is {name!r}, which PyTorch does not know; "
            + hint(name, ("cpu", "cuda", "mps"))
        ) from error
    if device.type == "cpu":
        return
    backend = getattr(torch, device.type, None)
    if backend is None or not backend.is_available():
        kind = "GPU" if device.type == "cuda" else device.type.upper()
        raise ValueError(f"the device is {name!r}, but PyTorch finds no {kind} here")
    if device.index and device.index >= backend.device_count():
        raise ValueError(f"the device is {name!r}, but the last is {backend.device_count() - 1}")
