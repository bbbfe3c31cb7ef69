"""Names that people give, and the nearest where they are unknown."""

import pytest
import torch

from dino_d2 import names
from dino_d2.names import check_device, hint, nearest, nearest_path, path_hint, plural


def test_the_nearest_names_come_first_whatever_their_case():
    assert nearest("solver.base_lr", ["OUTPUT_DIR", "SOLVER.BASE_LR", "SOLVER.LRS"])[0] == (
        "SOLVER.BASE_LR"
    )
    assert nearest("xyz", ["OUTPUT_DIR"]) == []


def test_among_the_files_of_a_large_dataset_few_are_compared(monkeypatch):
    files = [f"{7 * i:012d}.jpg" for i in range(20_000)]
    compare, compared = names.get_close_matches, []
    monkeypatch.setattr(
        names, "get_close_matches", lambda name, x: compared.append(len(x)) or compare(name, x)
    )
    assert nearest("000000091007.JPEG", files)[0] == "000000091007.jpg"
    assert nearest("00000091007.jpg", files)[0] == "000000091007.jpg"
    assert compared == [names.MAX_COMPARED] * 2


def test_an_unknown_name_is_answered_with_the_nearest_or_else_with_what_there_is():
    assert hint("circel", ["circle", "square"]) == "did you mean: circle"
    assert hint("xyz", ["circle", "square"]) == "available: circle, square"
    assert hint("xyz", []) == "available: none"
    many = hint("xyz", (str(i) for i in range(names.MAX_LISTED + 2)))
    assert many.startswith("available: 0, 1, 2, ") and many.endswith(" and 2 more")


def test_a_path_that_exists_has_no_nearest(tmp_path):
    (tmp_path / "a.json").touch()
    assert path_hint(tmp_path / "b.json") == f"; did you mean: '{tmp_path / 'a.json'}'"
    assert path_hint(tmp_path / "a.json") == path_hint(tmp_path) == ""
    assert path_hint(tmp_path / "nothing" / "like") == ""


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("data/imags/a.jpg", "data/images/a.jpg"),
        ("dat/image/A.jpeg", "data/images/a.jpg"),
        ("data/images/a.jpg", "data/images/a.jpg"),
        ("data/images/a.jpg/more", ""),
        ("data/zzz", ""),
    ],
)
def test_every_part_of_a_path_is_corrected_by_itself(wrong, right, tmp_path, monkeypatch):
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "a.jpg").touch()
    monkeypatch.chdir(tmp_path)
    assert nearest_path(wrong) == right
    assert nearest_path(str(tmp_path / wrong)) == (right and str(tmp_path / right))


def test_the_device_of_every_machine_is_there():
    check_device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "does not know; did you mean: cpu"),
        ("Cuda", "does not know; did you mean: cuda"),
        ("??", "does not know; available: cpu, cuda, mps"),
        ("cuda", "finds no GPU here"),
        ("mps", "finds no MPS here"),
        ("meta", "finds no META here"),
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(name, message, monkeypatch):
    for backend in (torch.cuda, torch.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(ValueError) as caught:
        check_device(name)
    assert str(caught.value).startswith(f"the device is '{name}'") and message in str(caught.value)


def test_a_gpu_beyond_the_last_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda")
    check_device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2', but the last is 1"):
        check_device("cuda:2")


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (1, "box", "1 box"),
        (0, "box", "0 boxes"),
        (2, "better class", "2 better classes"),
        (2, "query", "2 queries"),
        (2, "display", "2 displays"),
        (12345, "image", "12,345 images"),
    ],
)
def test_things_are_counted(number, noun, expected):
    assert plural(number, noun) == expected


def test_a_link_to_nothing_is_not_nearest_to_itself(tmp_path):
    (tmp_path / "data").symlink_to(tmp_path / "gone")
    end = names.path_hint(tmp_path / "data")
    assert end == f"; it is a link to '{tmp_path / 'gone'}', which does not exist"
    assert names.nearest_path(str(tmp_path / "date")) == ""
