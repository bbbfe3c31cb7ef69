"""What people name - keys, files, devices - and what comes nearest to a name that is unknown."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import torch


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names, the most similar first; upper and lower case are one."""
    known = list(known)
    matches = get_close_matches(name.lower(), {x.lower() for x in known})
    return [x for match in matches for x in known if x.lower() == match][:3]


def nearest_path(path: str) -> str:
    """The file or folder whose path is most similar, each part by itself; "" if none is."""
    found = Path()
    for part in Path(path).expanduser().parts:
        if not (found / part).exists():
            names = nearest(part, (x.name for x in found.iterdir())) if found.is_dir() else []
            if not names:
                return ""
            part = names[0]
        found /= part
    return str(found)


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
        near = nearest(name, ("cpu", "cuda", "mps"))
        hint = ", ".join(near or ("cpu", "cuda", "mps"))
        raise ValueError(
            f"the device is {name!r}, which PyTorch does not know; the nearest: {hint}"
        ) from error
    if device.type == "cpu":
        return
    backend = getattr(torch, device.type, None)
    if backend is None or not backend.is_available():
        kind = "GPU" if device.type == "cuda" else device.type.upper()
        raise ValueError(f"the device is {name!r}, but PyTorch finds no {kind} here")
    if device.index and device.index >= backend.device_count():
        raise ValueError(f"the device is {name!r}, but the last is {backend.device_count() - 1}")
