"""Checks of numbers that people set, each with a clear error."""

from collections.abc import Callable
from math import isfinite
from numbers import Integral, Real
from typing import Any


def require_whole(least: int = 1, **values: Any) -> None:
    """Raise a ValueError unless every value is a whole number of at least `least`.

    >>> require_whole(num_layers=0)
    Traceback (most recent call last):
    ValueError: num_layers is 0; it has to be a whole number from 1 on
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; it has to be a whole number from {least} on")


def require_share(**values: Any) -> None:
    """Raise a ValueError unless every value is a number from 0 to 1."""
    _require(lambda x: 0 <= x <= 1, "a number from 0 to 1", values)


def require_not_negative(**values: Any) -> None:
    """Raise a ValueError unless every value is finite and not below 0."""
    _require(lambda x: x >= 0, "a finite number, not below 0", values)


def require_positive(**values: Any) -> None:
    """Raise a ValueError unless every value is finite and above 0."""
    _require(lambda x: x > 0, "a finite number above 0", values)


def _require(fits: Callable[[Any], bool], wanted: str, values: dict[str, Any]) -> None:
    for name, x in values.items():
        if not isinstance(x, Real) or isinstance(x, bool) or not isfinite(x) or not fits(x):
            raise ValueError(f"{name} is {x!r}; it has to be {wanted}")
