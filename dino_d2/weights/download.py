"""Downloads a published file: resumed, with progress, checked, and never half of it."""

import hashlib
import os
from http import HTTPStatus
from http.client import IncompleteRead
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from iopath.common.file_io import file_lock

from ..layouts.renaming import CheckpointError
from ..progress import progress

BLOCK = 2**20  # bytes
TIMEOUT = 60  # seconds without a byte


def download(url: str, path: str, sha256: str = "") -> None:
    """Download a file, unless it is there.

    What an interrupted download left, beside it as `.part`, is continued where the server can do
    that. Several processes may ask for the same file: one downloads it.

    Args:
        url: of the file
        path: where it appears once it is complete; folders are created
        sha256: how its hash begins; "": not known

    Raises:
        CheckpointError: it is another file than published
        OSError, HTTPException: the network fails
    """
    part = f"{path}.part"
    with file_lock(path):
        if os.path.isfile(path):
            return
        try:
            with open(part, "ab") as file:
                append(url, file)
        finally:
            if not os.path.getsize(part):
                os.remove(part)
        found = hash_of(part)
        if not found.startswith(sha256):
            os.remove(part)
            raise CheckpointError(
                f"{url} is not the file that was published: its SHA-256 begins with "
                f"{found[: len(sha256)]}, not with {sha256}; what was downloaded is deleted"
            )
        os.replace(part, path)


def append(url: str, file: BinaryIO) -> None:
    """Add to a file what it lacks of that of an address."""
    start = file.tell()
    request = Request(url, headers={"User-Agent": "dino_d2", "Range": f"bytes={start}-"})
    try:
        reply = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return  # it is complete
        raise
    with reply:
        if reply.status != HTTPStatus.PARTIAL_CONTENT:
            file.truncate(start := 0)
        size = int(reply.headers.get("Content-Length") or 0)
        blocks = iter(lambda: reply.read(BLOCK), b"")
        name = os.path.basename(file.name.removesuffix(".part"))
        for block in progress(blocks, "MB", what=name, total=-(-size // BLOCK) or None):
            file.write(block)
    if size and file.tell() < start + size:
        raise IncompleteRead(b"", start + size - file.tell())


def hash_of(path: str) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            found.update(block)
    return found.hexdigest()
