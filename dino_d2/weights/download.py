"""Downloads a published file: resumable, with progress, checked, and atomic."""

import hashlib
import html
import os
import re
from http import HTTPStatus
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from iopath.common.file_io import file_lock, get_cache_dir

from ..detectron import PathManager
from ..layouts.renaming import CheckpointError
from ..progress import progress

BLOCK = 2**20  # bytes
TIMEOUT = 60  # seconds without a byte
AGENT = {"User-Agent": "dino_d2"}
# Google Drive's list of a public folder, links in it, and the address of a file without the
# question whether to go on although it is too large for a virus scan (as gdown has them).
DRIVE_LIST = "https://drive.google.com/embeddedfolderview?id={}"
DRIVE_LINK = re.compile(
    r'<a[^>]*href="[^"]*/(file/d|folders)/([-\w]+)[^"]*"[^>]*>(.*?)</a>', re.DOTALL
)
DRIVE_FILE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"


def fetch(path: str) -> str:
    """The local path of a file or URL, cached; a CheckpointError if it is unavailable."""
    path = os.path.expanduser(path)
    try:
        url = urlparse(path)._replace(query="").geturl()
        is_web = url.startswith(("http://", "https://"))
        local = cached(url) if is_web else PathManager.get_local_path(url)
    except FileNotFoundError as error:  # its message is complete
        raise CheckpointError(str(error)) from error
    except (OSError, HTTPException) as error:
        raise CheckpointError(
            f"'{path}' is not available ({error}): without a network, copy the file here by other "
            "means and give its path"
        ) from error
    if not os.path.isfile(local):
        raise CheckpointError(f"'{path}' is not a file")
    return local


def cached(url: str, sha256: str = "") -> str:
    """The local path of a file of the web, downloaded once into Detectron2's cache.

    Args, errors: as of `download`
    """
    local = os.path.join(get_cache_dir(), urlparse(url).path.lstrip("/"))
    if not os.path.isfile(local):
        download(url, local, sha256)
    return local


def download(url: str, path: str, sha256: str = "") -> None:
    """Download a file, unless it is there.

    An interrupted download, left as `.part`, is resumed if the file on the server is still the same
    (by its ETag). Several processes may ask for the same file: one downloads it.

    Args:
        url: of the file
        path: where it appears once it is complete; folders are created
        sha256: how its hash begins; "": not known

    Raises:
        CheckpointError: it is another file than published
        OSError, HTTPException: the network fails, or there is a web page in place of the file
    """
    part, tag = Path(f"{path}.part"), Path(f"{path}.etag")
    with file_lock(path):
        if os.path.isfile(path):
            return
        if not tag.exists():
            part.unlink(missing_ok=True)
        try:
            download_rest(url, part, tag)
        except (OSError, HTTPException):
            if not tag.exists():
                part.unlink(missing_ok=True)
            raise
        tag.unlink(missing_ok=True)
        found = hash_of(part)
        if not found.startswith(sha256):
            part.unlink()
            raise CheckpointError(
                f"{url} is not the file that was published: its SHA-256 begins with "
                f"{found[: len(sha256)]}, not with {sha256}; the download was deleted"
            )
        os.replace(part, path)


def download_rest(url: str, part: Path, tag: Path) -> None:
    """Complete a part of a file, whose ETag is in the file `tag`, or begin it."""
    start = part.stat().st_size if part.exists() else 0
    headers = AGENT
    if start:
        headers = AGENT | {"Range": f"bytes={start}-", "If-Range": tag.read_text()}
    try:
        reply = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if not start or error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") != f"bytes */{start}":  # is not complete either
            part.unlink()
            download_rest(url, part, tag)
        return
    if reply.headers.get_content_type() == "text/html":
        reply.close()
        raise OSError("the response is a web page, not a file")
    with reply, open(part, "ab") as file:
        if reply.status != HTTPStatus.PARTIAL_CONTENT:
            file.truncate(start := 0)
        etag = reply.headers.get("ETag", "")
        if etag.startswith('"'):  # others do not stand for every byte
            tag.write_text(etag)
        else:
            tag.unlink(missing_ok=True)
        size = int(reply.headers.get("Content-Length") or 0)
        blocks = iter(lambda: reply.read(BLOCK), b"")
        for block in progress(blocks, "MB", what=part.stem, total=-(-size // BLOCK) or None):
            file.write(block)
        missing = start + size - file.tell() if size else 0
    if missing > 0:
        raise IncompleteRead(b"", missing)


def in_drive(folder: str, name: str) -> str:
    """The URL of a file in a public folder of Google Drive, or in a folder of this.

    Args:
        folder: its URL, which ends in its id

    Raises:
        OSError, HTTPException: the network fails, or there is no such file
    """
    folders = [folder.rpartition("/")[2]]
    for id in folders:  # grows
        with urlopen(Request(DRIVE_LIST.format(id), headers=AGENT), timeout=TIMEOUT) as reply:
            page = reply.read().decode(errors="replace")
        for kind, found, text in DRIVE_LINK.findall(page):
            if kind == "folders" and found not in folders:
                folders.append(found)
            elif html.unescape(re.sub("<[^>]*>", "", text)).strip() == name:
                return DRIVE_FILE.format(found)
    raise OSError(f"{name} is not in the list of {folder}")


def hash_of(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            found.update(block)
    return found.hexdigest()
