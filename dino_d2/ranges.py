"""Numbers that people give, and the sentence on one that cannot be."""

from math import isfinite
from numbers import Integral, Real
from typing import Any


def require_whole(least: int = 1, **values: Any) -> None:
    """Refuse what is no whole number, or is too small.

    Args:
        least: that is possible
        values: by their names, as in `require_whole(num_layers=num_layers)`

    Raises:
        ValueError: one is no whole number, or below `least`
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; it has to be a whole number from {least} on")


def require_share(**values: Any) -> None:
    """Refuse what is no number from 0 to 1.

    Raises:
        ValueError: one of the values, by their names, is none
    """
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}; it has to be a number from 0 to 1")


def require_not_negative(**values: Any) -> None:
    """Refuse what is no finite number, or below 0.

    Raises:
        ValueError: one of the values, by their names, is
    """
    for name, value in values.items():
        if not _is_number(value) or value < 0:
            raise ValueError(f"{name} is {value!r}; it has to be a finite number, not below 0")


def require_positive(**values: Any) -> None:
    """Refuse what is no finite number above 0.

    Raises:
        ValueError: one of the values, by their names, is none
    """
    for name, value in values.items():
        if not _is_number(value) or value <= 0:
            raise ValueError(f"{name} is {value!r}; it has to be a finite number above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
