"""How far something is that takes long: a bar in a terminal, a line now and then in a log."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic
from typing import TypeVar

from tqdm import tqdm

from .names import plural

SECONDS = 30.0  # between two lines

T = TypeVar("T")


def progress(
    items: Iterable[T],
    unit: str,
    *,
    what: str = "",
    total: int | None = None,
    clock: Callable[[], float] = monotonic,
) -> Iterator[T]:
    """The items, one by one; meanwhile it is said, on stderr, how many there were.

    Args:
        items: to go through
        unit: what one of them is
        what: is done with them, "" if that is clear
        total: how many there are; None: asked, where the items know
        clock: seconds, from any time on
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        yield from tqdm(items, what or None, total, unit=unit)
        return
    start = said = clock()
    for done, item in enumerate(items):
        if (now := clock()) - said >= SECONDS:
            said = now
            number = plural(done, unit) if total is None else f"{done:,} of {plural(total, unit)}"
            head = f"{what}: " if what else ""
            print(f"{head}{number} after {now - start:.0f} s", file=sys.stderr, flush=True)
        yield item


@contextmanager
def alive(what: str, seconds: float = SECONDS) -> Iterator[None]:
    """Around one step that takes long and does not tell how far it is: meanwhile it is said, on
    stderr, that it goes on.

    Args:
        what: goes on, as "the error analysis"
        seconds: between two lines
    """
    start, done = monotonic(), Event()

    def say() -> None:
        while not done.wait(seconds):
            message = f"{what} goes on: {monotonic() - start:.0f} s so far"
            print(message, file=sys.stderr, flush=True)

    speaker = Thread(target=say, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()
