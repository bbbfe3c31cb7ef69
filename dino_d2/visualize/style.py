"""Colours and resolution of all figures, and names that can be drawn."""

# Those of Okabe and Ito, which the colour-blind can distinguish.
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PINK, YELLOW = "#56b4e9", "#cc79a7", "#f0e442"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PINK, YELLOW)
GREY, BLACK = "#999999", "#000000"

DPI = 110  # of figures


def one_line(text: str) -> str:
    """Remove the line breaks that names of classes and files can have."""
    return " ".join(text.split())


def short_name(name: str, length: int = 24) -> str:
    """Shorten a name to one line of at most `length` characters.

    >>> short_name("a very long name", length=8)
    'a very…'
    """
    name = one_line(name)
    return name if len(name) <= length else f"{name[: length - 1].rstrip()}…"


def escape_name(name: str, length: int = 24) -> str:
    """Shorten a name and escape dollars, which Matplotlib would read as formulas."""
    return short_name(name, length).replace("$", r"\$")
