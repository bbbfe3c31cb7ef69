"""Progress of long tasks: a bar in a terminal, an occasional line in a log."""

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
    """Iterate over items and report progress on stderr.

    Args:
        items: anything iterable
        unit: noun for one item
        what: the task, such as "drawing images"; "" if that is clear
        total: number of items; None: their `len`, if they have one
        clock: returns seconds
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
    """Report on stderr, now and then, that a long step such as "the export" is running."""
    start, done = monotonic(), Event()

    def say() -> None:
        while not done.wait(seconds):
            message = f"{what} is running: {monotonic() - start:.0f} s so far"
            print(message, file=sys.stderr, flush=True)

    speaker = Thread(target=say, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()
