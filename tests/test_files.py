"""Checkpoint files: what cannot be had or read says so in a sentence, and none of it is run."""

import argparse
import builtins
import collections
import http.client
import os
import pickle
import resource
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_d2.atomic import replacing
from dino_d2.layouts.renaming import CheckpointError
from dino_d2.weights import download
from dino_d2.weights import files as checkpoint_io
from dino_d2.weights.download import fetch
from dino_d2.weights.files import read, weights, write
from dino_d2.weights.releases import RELEASES

STATE = {"decoder.class_heads.0.bias": torch.arange(6.0).view(2, 3)}
URL = "https://example.com/models/dino.pth"
OFFICIAL = RELEASES["official/dino_R_50_4scale_24ep"]  # in a folder, without a mirror
DETREX = RELEASES["detrex/dino_R_50_4scale_12ep"]


def assert_one_sentence(error, *parts):
    message = str(error.value)
    assert [part for part in parts if str(part) not in message] == [], message
    assert "\n" not in message and len(message) < 500


# ---- files to be had


class Network:
    """Stands for the internet: serves one file, or fails."""

    def __init__(self):
        self.downloads, self.hashes, self.error = [], [], None

    def __call__(self, url, path, sha256=""):
        self.downloads.append(url)
        self.hashes.append(sha256)
        if self.error:
            raise self.error
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(STATE, path)


@pytest.fixture
def network(monkeypatch, tmp_path):
    """The cache is empty and lies in `tmp_path / "cache"`."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    network = Network()
    for module in (checkpoint_io, download):
        monkeypatch.setattr(module, "download", network)
    monkeypatch.setattr(checkpoint_io, "in_drive", lambda folder, name: f"{folder}?{name}")
    return network


def test_a_local_file_is_taken_where_it_is(tmp_path):
    write(STATE, str(tmp_path / "a.pth"))
    assert fetch(str(tmp_path / "a.pth")) == str(tmp_path / "a.pth")


def test_the_home_folder_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(STATE, str(tmp_path / "a.pth"))
    assert fetch("~/a.pth") == str(tmp_path / "a.pth")


def test_a_download_lands_in_the_cache_and_happens_once(network, tmp_path):
    local = fetch(URL)
    assert local == str(tmp_path / "cache" / "models" / "dino.pth")
    assert fetch(URL) == local and network.downloads == [URL]


def test_a_query_is_no_part_of_the_file(network):
    fetch(f"{URL}?matching_heuristics=True")
    assert network.downloads == [URL]


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("Name or service not known"),
        urllib.error.HTTPError(URL, 404, "Not Found", {}, None),
        ConnectionResetError("reset by peer"),
        TimeoutError("timed out"),
        http.client.InvalidURL("nonnumeric port"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_without_a_network_the_sentence_says_what_to_do(network, error):
    network.error = error
    with pytest.raises(CheckpointError) as caught:
        fetch(URL)
    assert_one_sentence(caught, URL, error, "copy the file here")


def test_a_published_checkpoint_is_downloaded_by_name(network, tmp_path):
    local = fetch(f"dino_d2://{DETREX.name}")
    assert network.downloads == [DETREX.url]
    assert Path(local).name == DETREX.file and tmp_path / "cache" in Path(local).parents
    fetch("dino_d2://detr/detr_R_50_500ep")
    assert network.hashes == ["", "e632da11"]


def test_a_published_checkpoint_without_a_network(network):
    network.error = urllib.error.URLError("Name or service not known")
    with pytest.raises(CheckpointError) as caught:
        fetch(f"dino_d2://{DETREX.name}")
    assert_one_sentence(caught, DETREX.name, "Name or service not known", "copy the file here")


def test_an_official_checkpoint_is_downloaded_from_its_folder_or_a_mirror(network, tmp_path):
    place = tmp_path / "cache" / "dino_d2" / OFFICIAL.file
    assert fetch(f"dino_d2://{OFFICIAL.name}") == str(place)
    fetch("dino_d2://dino_R_50_4scale_12ep")
    folder, mirror = network.downloads
    assert folder == f"{OFFICIAL.url}?{OFFICIAL.file}"
    assert mirror.startswith("https://huggingface.co/") and network.hashes == ["", "8b224307"]


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no network"), OSError("the answer is a web page")]
)
def test_what_a_folder_does_not_give_says_from_where_to_where(network, tmp_path, error):
    network.error = error
    with pytest.raises(CheckpointError) as caught:
        fetch(f"dino_d2://{OFFICIAL.name}")
    place = tmp_path / "cache" / "dino_d2" / OFFICIAL.file
    assert_one_sentence(caught, OFFICIAL.file, OFFICIAL.url, place, error)


def test_what_was_downloaded_by_hand_is_used(network, tmp_path):
    place = tmp_path / "cache" / "dino_d2" / OFFICIAL.file
    place.parent.mkdir(parents=True)
    place.touch()
    assert fetch(f"dino_d2://{OFFICIAL.name}") == str(place)
    assert network.downloads == []


def test_a_wrong_name_is_answered_with_the_nearest(network):
    with pytest.raises(CheckpointError) as caught:
        fetch("dino_d2://detrex/dino_R50_4scale_12ep")
    assert_one_sentence(caught, DETREX.name)


@pytest.mark.parametrize("path", ["nowhere.pth", "."])
def test_what_is_no_file_is_named(path):
    with pytest.raises(CheckpointError) as caught:
        fetch(path)
    assert_one_sentence(caught, f"'{path}' is not a file")


# ---- files to be read


def pickled(path, data, protocol=2):
    path.write_bytes(pickle.dumps(data, protocol))
    return str(path)


def saved(path, data, **options):
    torch.save(data, path, **options)
    return str(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_a_pytorch_file_is_read(tmp_path, zipped):
    path = saved(
        tmp_path / "a.pth", {"model": STATE, "epoch": 3}, _use_new_zipfile_serialization=zipped
    )
    data = read(path)
    assert data["epoch"] == 3
    assert torch.equal(data["model"]["decoder.class_heads.0.bias"], torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_pickle_protocol_are_read(tmp_path, protocol):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6).reshape(2, 3))}
    data = {"model": collections.OrderedDict(arrays), "lr": np.float64(0.5), "by": "Caffe2"}
    checkpoint = read(pickled(tmp_path / "a.pkl", data, protocol))
    assert checkpoint["lr"] == 0.5 and checkpoint["by"] == "Caffe2"
    state, _, _ = weights(checkpoint, "a.pkl")
    assert torch.equal(state["a"], torch.arange(6.0, dtype=torch.float64).view(2, 3))
    assert torch.equal(state["f"], torch.arange(6).view(2, 3))


def test_a_pickle_of_python_2_is_read(tmp_path):
    # {'a': array([1., 2.], dtype=float32)} as numpy of Python 2 wrote it, with byte strings
    (tmp_path / "a.pkl").write_bytes(
        b"\x80\x02}q\x00U\x01aq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03"
        b"K\x00\x85U\x01b\x87Rq\x04(K\x01K\x02\x85cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x08\x00\x00\x80?\x00\x00\x00@tbs."
    )
    state, _, _ = weights(read(str(tmp_path / "a.pkl")), "a.pkl")
    assert state["a"].tolist() == [1, 2]


FOREIGN = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "page": b"<!DOCTYPE html><html><title>Quota exceeded</title></html>",
    "picture": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(200),
    "archive": b"PK\x03\x04" + bytes(200),
}


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_named(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read(str(path))
    assert_one_sentence(caught, path, "damaged or not a checkpoint")
    assert "weights_only" not in str(caught.value)  # PyTorch's advice how to run it after all


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"\n <!DOCTYPE html>", "it is a web page, so its download has failed"),
        (b"<html><title>Quota exceeded</title>", "it is a web page, so its download has failed"),
    ],
)
def test_what_a_foreign_file_obviously_is_is_said(tmp_path, suffix, content, reason):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read(str(path))
    assert str(caught.value) == f"'{path}' is damaged or not a checkpoint: {reason}"


@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_truncated_file_is_named(tmp_path, suffix, part):
    path = tmp_path / f"a{suffix}"
    if suffix == ".pth":
        saved(path, {"model": {"a": torch.rand(1000)}})
    else:
        pickled(path, {"model": {"a": np.random.rand(1000)}})
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError) as caught:
        read(str(path))
    assert_one_sentence(caught, path, "damaged or not a checkpoint")


@pytest.mark.parametrize("data", [[1, 2], torch.ones(3), "weights", torch.nn.Linear(1, 1)])
def test_what_is_no_dict_is_named(tmp_path, data):
    with pytest.raises(CheckpointError) as caught:
        read(saved(tmp_path / "a.pth", data))
    assert_one_sentence(caught, tmp_path / "a.pth", "not a dict of weights")


# ---- code in files

ran = []  # what files made run, which has to stay empty


class Reduced:
    def __reduce__(self):
        return ran.append, ("reduce",)


class Called:
    """Is made by calling something of the builtins."""

    def __reduce__(self):
        return builtins.exec, ("import test_files as t; t.ran.append('exec')",)


class Commanded:
    def __reduce__(self):
        return os.system, ("echo 'this is not to be seen'",)


class Restored:
    def __init__(self):
        self.value = 1

    def __setstate__(self, state):
        ran.append("setstate")


class Created:
    def __new__(cls):
        ran.append("new")
        return super().__new__(cls)


@pytest.fixture
def nothing_runs(capfd):
    """Checks at the end that nothing of a file was run."""
    yield ran.clear
    assert ran == []
    assert "not to be seen" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("kind", [Restored, Created, Called])
def test_objects_beside_the_weights_are_read_without_running_them(tmp_path, nothing_runs, kind):
    path = saved(tmp_path / "a.pth", {"model": STATE, "more": [kind()], "epoch": 3})
    nothing_runs()  # from here on: making the object ran something, too
    data = read(path)
    assert data["epoch"] == 3 and not isinstance(data["more"][0], kind)
    assert torch.equal(data["model"]["decoder.class_heads.0.bias"], torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_a_command_to_the_system_is_refused(tmp_path, nothing_runs, zipped):
    data = {"model": STATE, "more": Commanded()}
    with pytest.raises(CheckpointError) as caught:
        read(saved(tmp_path / "a.pth", data, _use_new_zipfile_serialization=zipped))
    assert_one_sentence(caught, "a.pth", f"{os.system.__module__}.system")


@pytest.mark.parametrize("kind", [Reduced, Called, Commanded, Restored, Created])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path, nothing_runs, kind, protocol):
    path = pickled(tmp_path / "a.pkl", {"model": {"a": np.ones(1)}, "more": kind()}, protocol)
    nothing_runs()
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert_one_sentence(caught, "a.pkl", "would run", "not allowed")


@pytest.mark.parametrize(
    "name", ["numpy.core.multiarray.encode", "collections.ndarray", "numpy.load"]
)
def test_only_what_arrays_are_made_of_is_known_to_a_pickle(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    (tmp_path / "a.pkl").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(CheckpointError) as caught:
        read(str(tmp_path / "a.pkl"))
    assert_one_sentence(caught, f"would run {name}")


def test_the_arguments_beside_the_official_weights_do_no_harm(tmp_path):
    args = argparse.Namespace(
        lr=1e-4, backbone="resnet50", sizes=[480, 512], more=argparse.Namespace()
    )
    path = saved(tmp_path / "a.pth", {"model": STATE, "args": args, "epoch": 11})
    assert read(path)["epoch"] == 11


def test_the_log_beside_the_weights_of_mmdetection_does_no_harm(tmp_path):
    """Arrays of numpy, which are no concern of the weights either."""
    log = {"loss": np.arange(3.0), "time": np.float64(0.5)}
    read(saved(tmp_path / "a.pth", {"state_dict": STATE, "message_hub": log}))


# ---- weights in files


@pytest.mark.parametrize(
    "path", ["model", "state_dict", "blobs", "net", "ema", "model_ema.module", "a.b.params"]
)
def test_weights_are_found_wherever_tools_put_them_and_it_is_said(path):
    checkpoint = STATE
    for name in reversed(path.split(".")):
        checkpoint = {name: checkpoint, "epoch": 1}
    state, form, note = weights(checkpoint, "a.pth")
    assert form == "dino_d2" and state.keys() == STATE.keys()
    assert note == (
        ""
        if path in ("model", "blobs")
        else f"'a.pth': the model's weights are those under '{path}'"
    )


def test_a_bare_state_dict_is_found():
    state, form, note = weights(STATE, "a.pth")
    assert form == "dino_d2" and state.keys() == STATE.keys() and not note


@pytest.mark.parametrize(
    ("prefix", "removed"),
    [
        ("module.", "'module.'"),
        ("module.module.", "'module.module.'"),
        ("module._orig_mod.", "'module._orig_mod.'"),
        ("model.", "'model.'"),
        ("detector.net.", "'detector.net.'"),
        ("_orig_mod.model.module.", "'_orig_mod.' and 'model.module.'"),
    ],
)
def test_what_wrappers_put_before_all_names_is_taken_off_and_it_is_said(prefix, removed):
    given = {prefix + key: x for key, x in STATE.items()}
    state, form, note = weights({"model": given}, "a.pth")
    assert form == "dino_d2" and state.keys() == STATE.keys()
    assert note == f"'a.pth': {removed} removed from names"


@pytest.mark.parametrize("part", ["_orig_mod.", "_fsdp_wrapped_module."])
def test_what_wrappers_put_into_names_is_taken_out(part):
    given = {key.replace("encoder.", f"encoder.{part}"): x for key, x in STATE.items()}
    state, form, _ = weights({"model": given}, "a.pth")
    assert form == "dino_d2" and state.keys() == STATE.keys()


def test_a_prefix_of_names_that_make_no_layout_stays():
    given = {"stem.conv.weight": torch.ones(1), "stem.norm.weight": torch.ones(1)}
    assert weights({"model": given}, "a.pth").state.keys() == given.keys()


@pytest.mark.parametrize("first", ["model", "model_ema"])
def test_weights_come_before_their_moving_average_and_it_is_said(first):
    given = {
        name: {key: x + (name == "model") for key, x in STATE.items()}
        for name in ("model", "model_ema")
    }
    checkpoint = {first: given[first], **given}
    state, _, note = weights(checkpoint, "a.pth")
    assert all(torch.equal(x, given["model"][key]) for key, x in state.items())
    assert note == "'a.pth': the model's weights are those under 'model', not 'model_ema'"
    state, _, note = weights(checkpoint, "a.pth", averaged=True)
    assert all(torch.equal(x, STATE[key]) for key, x in state.items()) and "'model_ema'" in note


def test_weights_of_a_known_layout_come_before_other_tensors():
    optimizer = {"state": {0: {"exp_avg": torch.ones(9), "exp_avg_sq": torch.ones(9)}}}
    checkpoint = {
        "optimizer": optimizer,
        "other": dict.fromkeys("abcdefgh", torch.ones(1)),
        "x": STATE,
    }
    assert weights(checkpoint, "a.pth").state.keys() == STATE.keys()


@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        {"model": {}},
        {"model": {"name": "dino"}},
        {"optimizer": {"state": {0: torch.ones(1)}}},
        {0: torch.ones(1)},
        {"names": np.array(["cat", "dog"])},
        {"model": torch.nn.Linear(1, 1)},
    ],
)
def test_a_file_without_weights_is_named(checkpoint):
    with pytest.raises(CheckpointError) as caught:
        weights(checkpoint, "a.pth")
    assert_one_sentence(caught, "'a.pth' has no weights")


def test_the_file_of_another_model_is_named():
    """In names that official DINO has, too."""
    state = {"transformer.level_embed": torch.ones(4, 256), "query_feat.weight": torch.ones(300)}
    with pytest.raises(CheckpointError) as caught:
        weights({"model": state}, "a.pth")
    assert_one_sentence(caught, "'a.pth': this is neither DINO nor", "official")


# ---- files to be written


def test_what_is_written_is_read(tmp_path):
    write({"model": STATE, "iteration": 7}, str(tmp_path / "a.pth"))
    data = read(str(tmp_path / "a.pth"))
    assert data["iteration"] == 7
    assert torch.equal(data["model"]["decoder.class_heads.0.bias"], torch.arange(6.0).view(2, 3))
    assert [x.name for x in tmp_path.iterdir()] == ["a.pth"]


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    write({"model": STATE}, str(path))
    before = path.read_bytes()

    def fail(data, file):
        file.write(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match="no space.*make room"):
        write({"model": {}}, str(path))
    assert path.read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_is_not_complete_leaves_nothing(tmp_path, error):
    path = tmp_path / "a.txt"
    for before in ([], ["a.txt"]):
        with pytest.raises(error), replacing(str(path)) as file:
            file.write(b"half")
            raise error
        assert [x.name for x in tmp_path.iterdir()] == before
        path.write_text("old")
    assert path.read_text() == "old"
    with replacing(str(path)) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [x.name for x in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_in_a_folder_that_is_not_there_is_not_written(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(str(tmp_path / "nowhere" / "a.txt")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(path, mmap):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(checkpoint_io, "_read_torch", refuse)
    with pytest.raises(CheckpointError, match="cannot be read.*Permission denied"):
        checkpoint_io.read(str(tmp_path / "a.pth"))


def test_a_lack_of_memory_is_not_the_fault_of_the_file(tmp_path, monkeypatch):
    def fail(path, mmap):
        raise MemoryError

    monkeypatch.setattr(checkpoint_io, "_read_torch", fail)
    with pytest.raises(MemoryError):
        checkpoint_io.read(str(tmp_path / "a.pth"))


def test_a_disk_that_is_full_is_one_sentence_and_leaves_the_old_file(tmp_path):
    """A limit of the system on the size of files fails as a full disk does, within PyTorch."""
    path = tmp_path / "a.pth"
    write({"model": STATE}, str(path))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            write({"model": {"a": torch.rand(1_000_000)}}, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_sentence(caught, f"'{path}' cannot be written: ", "File too large", "make room")
    assert path.read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["a.pth"]


def test_mapped_tensors_are_the_same_and_copied_into_a_model(tmp_path):
    path = str(tmp_path / "a.pth")
    torch.save({"model": {"x": torch.arange(3.0)}}, path)
    assert torch.equal(read(path, mmap=True)["model"]["x"], torch.arange(3.0))
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read(path, mmap=True)["x"], torch.ones(2))  # cannot be mapped, is read
