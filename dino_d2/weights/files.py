"""Downloads, reads and writes checkpoint files; reading never executes code in a file."""

import os
import pickle
import re
from collections.abc import Iterator
from functools import partial
from http.client import HTTPException
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
from iopath.common.file_io import PathHandler, get_cache_dir
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..atomic import replacing
from ..detectron import PathManager
from ..layouts.dino import detect_format
from ..layouts.renaming import CheckpointError, State
from .download import cached, download, in_drive
from .releases import find

# What PyTorch's wrappers put into names: data-parallel training at their beginning; torch.compile,
# sharding and activation checkpointing (_orig_mod, _fsdp_wrapped_module, ...) anywhere.
WRAPPERS = re.compile(r"^(?:module\.|_\w*mod(?:ule)?\.)+|(?<=\.)_\w*mod(?:ule)?\.")
MAX_DEPTH = 3  # of dicts in dicts
USUAL_PLACES = "", "model", "blobs"  # of PyTorch's, Detectron2's and Caffe2's files


class ReleaseHandler(PathHandler):
    """Resolves `dino_d2://NAME` to the file of a published checkpoint."""

    PREFIX = "dino_d2://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        """Download a file, unless it lies where a person was asked to put it.

        Raises:
            FileNotFoundError: its name is unknown, or a folder of files does not give it
        """
        release = find(path.removeprefix(self.PREFIX))
        local = os.path.join(get_cache_dir(), "dino_d2", release.file)
        if os.path.isfile(local):
            return local
        if not release.in_folder:
            return cached(release.url, release.sha256)
        try:
            download(in_drive(release.url, release.file), local, release.sha256)
        except (OSError, HTTPException) as error:
            raise FileNotFoundError(
                f"{release.file} cannot be downloaded ({error}): open {release.url} in a browser, "
                f"and put the file at {local}"
            ) from error
        return local


PathManager.register_handler(ReleaseHandler())


class DamagedCheckpoint(CheckpointError):
    """A file is not a complete checkpoint."""


def read(path: str, *, mmap: bool = False) -> dict:
    """Read a `.pkl`, `.safetensors` or PyTorch file: tensors, arrays and plain Python values.

    With `mmap`, tensors of a PyTorch file stay on the disk until they are used, so that a model is
    not in memory twice; the file must not change meanwhile.

    Raises:
        DamagedCheckpoint: it is incomplete, or not a checkpoint
        CheckpointError: it cannot be opened, or contains something else
    """
    try:
        read_as = {".pkl": _read_pickle, ".safetensors": _read_safetensors}
        read_torch = partial(_read_torch, mmap=mmap)
        data = read_as.get(os.path.splitext(path)[1], read_torch)(path)
    except ModuleNotFoundError as error:
        raise CheckpointError(f"'{path}' needs {error.name}: pip install {error.name}") from error
    except MemoryError:  # not an error of the file
        raise
    except PermissionError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}") from error
    except Exception as error:  # a damaged file may raise anything
        # Keep PyTorch's reason, but not its advice to load the file unsafely.
        cause = error.__context__ or error
        reason = _obvious(path) or re.split(r"\. |\n", str(cause))[0] or type(cause).__name__
        raise DamagedCheckpoint(f"'{path}' is damaged or not a checkpoint: {reason}") from error
    if not isinstance(data, dict):
        kind = type(data).__name__.lstrip("_")
        raise CheckpointError(f"'{path}' holds a {kind}, not a dict of weights")
    return data


class Weights(NamedTuple):
    """A state dict and its format.

    Attributes:
        state: tensors by name, without the prefixes of wrappers
        form: as by `detect_format`
        note: a sentence on what was selected and renamed, or ""
    """

    state: State
    form: str | None
    note: str


def weights(checkpoint: dict, filename: str, *, averaged: bool = False) -> Weights:
    """Find the state dict in a checkpoint, at any depth, and remove prefixes of its names.

    Of several, a known format comes first, then one that is not a moving average (no key on the way
    to it is "ema"), then the largest, then the first.

    Args:
        checkpoint: as returned by `read`
        filename: for messages
        averaged: select a moving average

    Raises:
        CheckpointError: there is none, or it is of another model
    """
    try:
        found = [(place, *_unwrap(state)) for place, state in _state_dicts(checkpoint)]
    except CheckpointError as error:
        raise CheckpointError(f"'{filename}': {error}") from error
    found = [x for x in found if _is_average(x[0]) or not averaged]
    if not found:
        kind = "averaged weights" if averaged else "weights"
        raise CheckpointError(
            f"'{filename}' has no {kind} in it: they are a dict of tensors, as model.state_dict() "
            "returns it"
        )
    found.sort(key=lambda x: (x[2] is None, _is_average(x[0]), -len(x[1])))
    place, state, form, removed = found[0]
    others = [f"'{x[0]}'" for x in found[1:] if form and x[2] == form]
    notes = []
    if others or place not in USUAL_PLACES:
        notes.append(f"the model's weights are those under '{place}'")
    if others:
        notes.append(f"not {' or '.join(others)}")
    if removed:
        notes.append(f"{' and '.join(removed)} removed from names")
    note = f"'{filename}': {', '.join(notes)}" if notes else ""
    tensors = {k: x if isinstance(x, Tensor) else torch.tensor(x) for k, x in state.items()}
    return Weights(tensors, form, note)


def _state_dicts(checkpoint: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Every dict of named tensors, with the keys that lead to it."""
    state = {k: x for k, x in checkpoint.items() if isinstance(k, str) and _is_numeric(x)}
    if state:
        yield ".".join(path), state
    if len(path) < MAX_DEPTH:
        for key, x in checkpoint.items():
            if isinstance(x, dict):
                yield from _state_dicts(x, (*path, str(key)))


def _is_average(place: str) -> bool:
    return "ema" in re.split(r"[._]", place.lower())


def _unwrap(state: dict) -> tuple[dict, str | None, list[str]]:
    """Remove the prefixes of wrappers, and a common prefix if the format is known without it.

    Returns the state, its format, and what was removed.
    """
    removed = sorted({f"'{part}'" for key in state for part in WRAPPERS.findall(key)})
    state = {WRAPPERS.sub("", key): x for key, x in state.items()}
    common = os.path.commonprefix(list(state)).split(".")[:-1]
    for count in range(len(common) + 1):
        prefix = "".join(f"{part}." for part in common[:count])
        shorter = {key.removeprefix(prefix): x for key, x in state.items()}
        if form := detect_format(shorter):
            return shorter, form, removed + [f"'{prefix}'"] * bool(prefix)
    return state, None, removed


def _is_numeric(x: Any) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, np.ndarray) and x.dtype.kind in "biuf")


def _obvious(path: str) -> str:
    """What a file is, if it is one that is often mistaken for a checkpoint."""
    with open(path, "rb") as file:
        start = file.read(100).lstrip()
    if not start:
        return "it is empty"
    return "it is a web page, so its download has failed" if start.startswith(b"<") else ""


def write(data: dict, path: str) -> None:
    """Write a checkpoint atomically; a CheckpointError if the disk is full or read-only."""
    try:
        with replacing(path) as file:
            torch.save(data, file)
    except (OSError, RuntimeError) as error:  # PyTorch raises a RuntimeError for files
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise CheckpointError(
            f"'{path}' cannot be written: {reason}; make room or fix the permissions; earlier "
            "checkpoints are complete"
        ) from error


class _ForeignObject:
    """A placeholder for objects of unknown classes, which are neither kept nor executed."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_torch(path: str, *, mmap: bool) -> Any:
    is_zip = is_zipfile(path)  # since PyTorch 1.6
    foreign = get_unsafe_globals_in_checkpoint(path) if is_zip else []
    with safe_globals([(_ForeignObject, name) for name in foreign]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)


def _read_safetensors(path: str) -> State:
    from safetensors.torch import load_file

    return load_file(path)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and refuses everything else."""

    ALLOWED = frozenset(
        {
            *("numpy.ndarray", "numpy.dtype", "collections.OrderedDict", "_codecs.encode"),
            # numpy 2 writes numpy._core, a pickle of protocol 5 _frombuffer
            *(
                f"numpy.{core}.{name}"
                for core in ("core", "_core")
                for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}, which is not allowed")


def _read_pickle(path: str) -> Any:
    with open(path, "rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()
