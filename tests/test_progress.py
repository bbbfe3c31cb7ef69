"""How far something is: a bar in a terminal, a line every half a minute elsewhere."""

import sys
from threading import Event

import pytest

from dino_d2.progress import alive, progress


def go(count, seconds, **options):
    """Through so many items, each of which takes so many seconds of a pretended clock."""
    time = [0.0]
    for _ in progress(range(count), "box", clock=lambda: time[0], **options):
        time[0] += seconds


@pytest.mark.parametrize("items", [[1, 2, 3], iter([1, 2, 3])])
def test_every_item_comes_in_its_order(items):
    assert list(progress(items, "image")) == [1, 2, 3]


def test_a_line_is_written_every_half_a_minute(capsys):
    go(100, seconds=1)
    lines = [
        "30 of 100 boxes after 30 s",
        "60 of 100 boxes after 60 s",
        "90 of 100 boxes after 90 s",
    ]
    assert capsys.readouterr().err.splitlines() == lines


def test_what_is_slow_has_a_line_an_item(capsys):
    go(3, seconds=70, what="drawing")
    lines = ["drawing: 1 of 3 boxes after 70 s", "drawing: 2 of 3 boxes after 140 s"]
    assert capsys.readouterr().err.splitlines() == lines


def test_what_is_quick_has_no_line(capsys):
    go(1000, seconds=0.02)
    assert not capsys.readouterr().err


def test_without_a_number_of_all_the_number_done_is_said(capsys):
    time = iter([0, 0, 31])
    list(progress(iter("ab"), "box", clock=lambda: next(time)))
    assert capsys.readouterr().err == "1 box after 31 s\n"


def test_a_terminal_has_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    go(100, seconds=40)
    said = capsys.readouterr().err
    assert "100/100" in said and "after" not in said


class Lines(list):
    """A stream that knows when it was written to."""

    written = Event()

    def write(self, text):
        self.append(text)
        self.written.set()

    def flush(self):
        pass


def test_what_cannot_tell_how_far_it_is_goes_on_and_says_so_until_it_ends(monkeypatch):
    lines = Lines()
    monkeypatch.setattr(sys, "stderr", lines)
    with pytest.raises(ValueError, match="x"), alive("the export", seconds=0.01):
        assert lines.written.wait(600)
        raise ValueError("x")
    assert lines[0] == "the export is running: 0 s so far"
    lines.written.clear()
    assert not lines.written.wait(0.1)
