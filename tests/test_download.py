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
from dino_d2.weights.download import download, in_drive

DATA = bytes(range(256)) * 20
HASH = hashlib.sha256(DATA).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves the data of its server as its attributes say."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        if page := server.lists.get(self.path):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())
            return
        same = server.resumes and asked and self.headers.get("If-Range") == server.etag
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if same else 0
        if server.error:
            self.send_error(server.error)
        elif start >= len(server.data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.data)}")
            self.end_headers()
        else:
            self.send_response(206 if same else 200)
            if server.etag:
                self.send_header("ETag", server.etag)
            if server.kind:
                self.send_header("Content-Type", server.kind)
            if server.says_size:
                self.send_header("Content-Length", str(len(server.data) - start))
            self.end_headers()
            self.wfile.write(server.data[start : server.stops_at])

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.data, server.etag = DATA, '"first"'
    server.asked, server.error, server.stops_at = [], 0, None
    server.kind, server.lists = "", {}
    server.resumes = server.says_size = True
    server.url = f"http://127.0.0.1:{server.server_port}/models/dino.pth"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def interrupt(server, path):
    """A download that ends after 1000 bytes."""
    server.stops_at = 1000
    with pytest.raises(IncompleteRead):
        download(server.url, str(path))
    server.stops_at = None


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
    assert server.asked == [None]


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_download_goes_on_where_it_was_or_begins_again(server, path, resumes):
    server.resumes = resumes
    interrupt(server, path)
    assert left_in(path) == ["dino.pth.etag", "dino.pth.part"]
    download(server.url, str(path), HASH[:8])
    assert path.read_bytes() == DATA and left_in(path) == ["dino.pth"]
    assert server.asked == [None, "bytes=1000-"]


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_mark_of_the_version_it_begins_again(server, path, etag):
    server.etag = etag
    interrupt(server, path)
    assert left_in(path) == []
    download(server.url, str(path))
    assert path.read_bytes() == DATA and server.asked == [None, None]


def test_parts_of_two_versions_are_not_joined(server, path):
    interrupt(server, path)
    server.data, server.etag = b"new" * 1000, '"second"'
    download(server.url, str(path))
    assert path.read_bytes() == b"new" * 1000 and left_in(path) == ["dino.pth"]


@pytest.mark.parametrize("more", [b"", b"too much"])
def test_a_part_that_has_all_is_complete_and_one_that_has_more_is_not(server, path, more):
    interrupt(server, path)
    path.with_name("dino.pth.part").write_bytes(DATA + more)
    download(server.url, str(path), HASH)
    assert path.read_bytes() == DATA and left_in(path) == ["dino.pth"]
    assert len(server.asked) == (3 if more else 2)


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
    with pytest.raises(URLError):
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


def test_a_web_page_is_no_file(server, path):
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(OSError, match="a web page, not a file"):
        download(server.url, str(path))
    assert left_in(path) == []


# ---- a folder of Google Drive, as gdown finds its lists to be; the real one was never asked

FOLDER = "https://drive.google.com/drive/folders/top-1"
ENTRY = """<div class="flip-entry" id="entry-{id}"><div class="flip-entry-info">
<a href="https://drive.google.com/{kind}/{id}{end}" target="_blank">
<div class="flip-entry-visual"></div><div class="flip-entry-title">{name}</div></a></div></div>"""


def entry(name, id, kind="file/d", end="/view?usp=drive_web"):
    return ENTRY.format(name=name, id=id, kind=kind, end=end)


@pytest.fixture
def drive(server, monkeypatch):
    """A folder with two files and a folder with another, which links back."""
    root = server.url.removesuffix("/models/dino.pth")
    monkeypatch.setattr(module, "DRIVE_LIST", f"{root}/list?id={{}}")
    monkeypatch.setattr(module, "DRIVE_FILE", f"{root}/download?id={{}}&confirm=t")
    inner = entry("swin", "inner_2", "drive/folders", "")
    outer = entry("models", "top-1", "drive/folders", "")
    server.lists = {
        "/list?id=top-1": entry("a_5scale.pth", "id-5") + entry("a&amp;b.pth", "id_4") + inner,
        "/list?id=inner_2": outer + entry("swin.pth", "id-s"),
    }
    return root


@pytest.mark.parametrize(
    ("name", "id"), [("a_5scale.pth", "id-5"), ("a&b.pth", "id_4"), ("swin.pth", "id-s")]
)
def test_a_file_of_a_folder_of_google_drive_is_found_by_its_name(drive, path, name, id):
    url = in_drive(FOLDER, name)
    assert url == f"{drive}/download?id={id}&confirm=t"
    download(url, str(path), HASH)
    assert path.read_bytes() == DATA


def test_a_file_that_a_folder_does_not_have_is_named(drive):
    with pytest.raises(OSError, match=f"5scale.pth is not in the list of {FOLDER}"):
        in_drive(FOLDER, "5scale.pth")
