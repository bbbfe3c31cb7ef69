"""What all pictures share: colours, resolution, and names as they can be drawn."""

# Those of Okabe and Ito, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PINK, YELLOW = "#56b4e9", "#cc79a7", "#f0e442"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PINK, YELLOW)
GREY, BLACK = "#999999", "#000000"

DPI = 110  # of figures


def one_line(text: str) -> str:
    """Without the line breaks that names of classes and files can have."""
    return " ".join(text.split())


def short_name(name: str, length: int = 24) -> str:
    """On one line, cut off where it is longer than so many characters."""
    name = one_line(name)
    return name if len(name) <= length else f"{name[: length - 1].rstrip()}…"


def escape_name(name: str, length: int = 24) -> str:
    """Short, and for Matplotlib, which takes what is between dollars for a formula."""
    return short_name(name, length).replace("$", r"\$")
