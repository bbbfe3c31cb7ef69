"""Gets, reads and writes checkpoint files; reading never runs code that a file brings along."""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any, BinaryIO
from urllib.parse import urlparse
from zipfile import is_zipfile

import numpy as np
import torch
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import get_cache_dir
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from .checkpoint import CheckpointError, State, detect_format
from .releases import find


class ReleaseHandler(PathHandler):
    """`dino_d2://NAME` is the file of a published checkpoint, by its name in the model zoo."""

    PREFIX = "dino_d2://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        """
        Raises:
            FileNotFoundError: no such name, or a file that has to be downloaded by hand and is not
        """
        release = find(path.removeprefix(self.PREFIX))
        if not release.by_hand:
            return PathManager.get_local_path(release.url, force=force, **kwargs)
        local = os.path.join(get_cache_dir(), "dino_d2", release.file)
        if not os.path.isfile(local):
            raise FileNotFoundError(
                f"{release.file} lies in a folder that only a browser opens, {release.url}: "
                f"download it to {local}"
            )
        return local


PathManager.register_handler(ReleaseHandler())


def fetch(path: str) -> str:
    """The local path of a file or URL, downloaded into Detectron2's cache if need be.

    Raises:
        CheckpointError: there is no such file, or no connection
    """
    path = os.path.expanduser(path)
    try:
        local = PathManager.get_local_path(urlparse(path)._replace(query="").geturl())
    except FileNotFoundError as error:  # says itself what to do
        raise CheckpointError(str(error)) from error
    except (OSError, HTTPException) as error:
        raise CheckpointError(
            f"'{path}' cannot be had ({error}): without a network, copy the file here by other "
            "means and give its path"
        ) from error
    if not os.path.isfile(local):
        raise CheckpointError(f"'{path}' is no file")
    return local


class DamagedCheckpoint(CheckpointError):
    """What is in a file is not, or not all of, a checkpoint."""


def read(path: str) -> dict:
    """The content of a `.pkl`, `.safetensors` or PyTorch file: tensors, arrays and plain Python
    values.

    Raises:
        DamagedCheckpoint: it is truncated, or no checkpoint
        CheckpointError: it cannot be opened, or holds something else
    """
    try:
        read_as = {".pkl": _read_pickle, ".safetensors": _read_safetensors}
        data = read_as.get(os.path.splitext(path)[1], _read_torch)(path)
    except ModuleNotFoundError as error:
        raise CheckpointError(f"'{path}' needs {error.name}: pip install {error.name}") from error
    except MemoryError:  # not the fault of the file
        raise
    except PermissionError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}") from error
    except Exception as error:  # a damaged file can fail in any way
        # PyTorch hides the reason in advice to load it unsafely, which is not passed on.
        cause = error.__context__ or error
        reason = _obvious(path) or re.split(r"\. |\n", str(cause))[0] or type(cause).__name__
        raise DamagedCheckpoint(f"'{path}' is damaged or no checkpoint: {reason}") from error
    if not isinstance(data, dict):
        kind = type(data).__name__.lstrip("_")
        raise CheckpointError(f"'{path}' holds a {kind}, not a dict of weights")
    return data


def weights(checkpoint: dict, filename: str) -> tuple[State, str | None]:
    """The state dict in a checkpoint, and its format.

    Raises:
        CheckpointError: there is none
    """
    names = ("model", "state_dict", "model_state", "blobs")
    state = next((checkpoint[name] for name in names if name in checkpoint), checkpoint)
    if not isinstance(state, dict):
        raise CheckpointError(f"'{filename}' has a model that is no dict of weights")
    state = {
        key.removeprefix("module."): x if isinstance(x, Tensor) else torch.tensor(x)
        for key, x in state.items()
        if isinstance(key, str) and _is_numeric(x)
    }
    if not state:
        raise CheckpointError(f"'{filename}' has no weights in it")
    try:
        return state, detect_format(state)
    except CheckpointError as error:
        raise CheckpointError(f"'{filename}': {error}") from error


def _is_numeric(x: Any) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, np.ndarray) and x.dtype.kind in "biuf")


def _obvious(path: str) -> str:
    """What a file is that is taken for a checkpoint most often, if it is one of these."""
    with open(path, "rb") as file:
        start = file.read(100).lstrip()
    if not start:
        return "it is empty"
    return "it is a web page, so its download has failed" if start.startswith(b"<") else ""


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write that gets its name when it is complete; until then, whatever had it stays."""
    temporary = f"{path}.incomplete"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write(data: dict, path: str) -> None:
    """Saves a checkpoint, completely or not at all.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to
    """
    try:
        with replacing(path) as file:
            torch.save(data, file)
    except (OSError, RuntimeError) as error:  # of files PyTorch makes a RuntimeError
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise CheckpointError(
            f"'{path}' cannot be written: {reason}; make room or correct the rights, what was "
            "saved before is complete"
        ) from error


class _ForeignObject:
    """Stands for an object of a class that is not PyTorch's: nothing of it is kept or run."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_torch(path: str) -> Any:
    foreign = get_unsafe_globals_in_checkpoint(path) if is_zipfile(path) else []
    with safe_globals([(_ForeignObject, name) for name in foreign]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: str) -> State:
    from safetensors.torch import load_file

    return load_file(path)


class _ArrayUnpickler(pickle.Unpickler):
    """Knows arrays and refuses everything else."""

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
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}, which is not done")


def _read_pickle(path: str) -> Any:
    with open(path, "rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()
