"""Downloads from a server on this machine."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError, URLError

import pytest

from dino_d2.layouts.renaming import CheckpointError
from dino_d2.weights import download as module
from dino_d2.weights.download import download

DATA = bytes(range(256)) * 20
HASH = hashlib.sha256(DATA).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves DATA as the attributes of its server say."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if server.resumes else 0
        if server.error or start >= len(DATA):
            self.send_error(server.error or 416)
            return
        self.send_response(206 if server.resumes else 200)
        if server.says_size:
            self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        self.wfile.write(DATA[start : server.stops_at])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.error, server.stops_at = [], 0, None
    server.resumes = server.says_size = True
    server.url = f"http://127.0.0.1:{server.server_port}/models/dino.pth"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "models" / "dino.pth"


def left_in(path):
    """Files beside it, but for the lock."""
    return sorted(x.name for x in path.parent.iterdir() if x.suffix != ".lock")


@pytest.mark.parametrize("says_size", [True, False])
def test_a_file_is_downloaded_once_and_whole(server, path, says_size):
    server.says_size = says_size
    for _ in range(2):
        download(server.url, str(path), HASH)
    assert path.read_bytes() == DATA and left_in(path) == ["dino.pth"]
    assert server.asked == ["bytes=0-"]


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_download_goes_on_where_it_was_or_begins_again(server, path, resumes):
    server.resumes, server.stops_at = resumes, 1000
    with pytest.raises(IncompleteRead):
        download(server.url, str(path))
    assert left_in(path) == ["dino.pth.part"]
    server.stops_at = None
    download(server.url, str(path), HASH[:8])
    assert path.read_bytes() == DATA and left_in(path) == ["dino.pth"]
    assert server.asked == ["bytes=0-", "bytes=1000-"]


def test_a_download_that_only_was_not_renamed_is_complete(server, path):
    path.parent.mkdir(parents=True)
    path.with_suffix(".pth.part").write_bytes(DATA)
    download(server.url, str(path), HASH)
    assert path.read_bytes() == DATA and server.asked == [f"bytes={len(DATA)}-"]


def test_another_file_than_published_is_refused_and_deleted(server, path):
    with pytest.raises(CheckpointError, match=f"{server.url} is not the file .* {HASH[:4]}, not"):
        download(server.url, str(path), "beef")
    assert left_in(path) == []


@pytest.mark.parametrize("error", [404, 500, 416])
def test_an_error_of_the_server_leaves_nothing(server, path, error):
    server.error = error
    with pytest.raises(HTTPError, match=str(error)):
        download(server.url, str(path))
    assert left_in(path) == []


def test_a_server_that_is_not_there_leaves_nothing(path):
    with pytest.raises(URLError, match="refused"):
        download("http://127.0.0.1:1/dino.pth", str(path))
    assert left_in(path) == []


def test_of_several_that_want_a_file_one_downloads_it(server, path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download(server.url, str(path), HASH), range(4)))
    assert path.read_bytes() == DATA and len(server.asked) == 1


def test_progress_is_told_in_megabytes(server, path, monkeypatch):
    told = []

    def progress(blocks, unit, what, total):
        told.append((unit, what, total))
        return blocks

    monkeypatch.setattr(module, "progress", progress)
    monkeypatch.setattr(module, "BLOCK", 1000)
    download(server.url, str(path), HASH)
    assert told == [("MB", "dino.pth", 6)]  # of 5,120 bytes
