"""Suggestions for unknown names of keys, files and devices, and words for messages."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from heapq import nlargest
from itertools import pairwise
from pathlib import Path

import torch

MAX_COMPARED = 1000  # names that are compared exactly, at 20 microseconds each
MAX_LISTED = 40


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """At most three similar names, the most similar first; case is ignored.

    >>> nearest("learning_rat", ["learning_rate", "batch_size"])
    ['learning_rate']
    """
    known = list(known)
    name, others = name.lower(), list({x.lower() for x in known})
    if len(others) > MAX_COMPARED:  # such as COCO's files: preselect by pairs of letters
        pairs = set(pairwise(name))
        others = nlargest(MAX_COMPARED, others, lambda x: len(pairs.intersection(pairwise(x))))
    matches = get_close_matches(name, others)
    return [x for match in matches for x in known if x.lower() == match][:3]


def hint(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: similar names or, without any, all names.

    >>> hint("catt", ["cat", "dog"])
    'did you mean: cat'
    >>> hint("horse", ["cat", "dog"])
    'available: cat, dog'
    """
    known = list(known)
    if near := nearest(name, known):
        return f"did you mean: {', '.join(near)}"
    more = len(known) - MAX_LISTED
    listed = ", ".join(known[:MAX_LISTED]) or "none"
    return f"available: {listed}" + (f" and {more} more" if more > 0 else "")


def nearest_path(path: str) -> str:
    """The existing path most similar to one that does not exist, part by part; "" if none is."""
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
    """A number with its noun, whose last word is put into the plural.

    >>> plural(1, "box"), plural(1000, "small box"), plural(2, "category")
    ('1 box', '1,000 small boxes', '2 categories')
    """
    if number == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{number:,} {noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}s"


def path_hint(path: str | os.PathLike[str]) -> str:
    """The end of a message about a missing path: a broken link's target, a similar path, or ""."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"; it is a link to '{os.readlink(path)}', which does not exist"
    near = "" if os.path.exists(path) else nearest_path(os.fspath(path))
    return f"; did you mean: '{near}'" if near else ""


def check_device(name: str) -> None:
    """Raise a ValueError if PyTorch does not know or have a device such as "cpu" or "cuda:1"."""
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
