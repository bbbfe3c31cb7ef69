"""Imports what a YAML config names under IMPORTS."""

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from traceback import extract_tb


def import_parts(name: str, folder: Path) -> str:
    """Import a Python file or a module once, so that its registrations take effect.

    Args:
        name: a module, or a file, which ends in .py
        folder: where a file is looked for first; then in the working directory

    Returns:
        the name; for a file, its absolute path

    Raises:
        ValueError: it does not exist, or fails to import; says in which line
    """
    if not isinstance(name, str):
        raise ValueError(f"IMPORTS has {name!r}: name files that end in .py, or modules")
    places = (folder / name, Path(name).expanduser()) if name.endswith(".py") else ()
    found = [str(x.resolve()) for x in places if x.is_file()]
    if places and not found:
        raise ValueError(
            f"IMPORTS names '{name}', which is neither in '{folder}' nor in the working directory"
        )
    try:
        import_file(found[0]) if found else import_module(name)
    except Exception as error:  # it is a program, and may raise anything
        raise ValueError(f"IMPORTS names '{name}': {failed_line(error)}") from error
    return found[0] if found else name


@cache
def import_file(path: str) -> None:
    """Import a Python file under its own name, so that other processes can find it, too."""
    name, folder = Path(path).stem, str(Path(path).parent)
    loaded, spec = sys.modules.get(name), None if name in sys.modules else find_spec(name)
    place = getattr(loaded, "__file__", None) or (spec and spec.origin) or ""
    if (loaded or spec) and str(Path(place).resolve()) != path:
        raise ImportError(f"there is another module '{name}': rename this file")
    sys.path.append(folder)  # which other processes are given
    import_module(name)


def failed_line(error: Exception) -> str:
    """Where an import failed and why, in one line."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    lines = [x for x in extract_tb(error.__traceback__) if x.name == "<module>"]
    return f"'{lines[-1].filename}', line {lines[-1].lineno}: {reason}" if lines else reason
