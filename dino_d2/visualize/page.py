"""Shared parts of HTML pages, for any screen size, in light and dark mode."""

import base64
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --ground: #fff; --soft: #5c5c5c; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --ground: #16181a; --soft: #a9a9a9; }
}
body { margin: 0 auto; max-width: 70rem; padding: 1rem; color: var(--text);
  background: var(--ground); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.25; }
p, figcaption { max-width: 44rem; }
figure { margin: 1rem 0 3rem; }
pre, .scroll { overflow-x: auto; }
pre { overflow-wrap: normal; }
img { display: block; max-width: max(100%, 42rem); border-radius: 6px; background: #fff; }
figcaption, footer, .soft { color: var(--soft); font-size: 0.9rem; }
"""


def html_page(heading: str, body: str) -> str:
    """A complete page with a heading, which is also its title, and a body of HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(heading)}</h1>
{body}</body>
</html>
"""


def data_uri(content: bytes, kind: str) -> str:
    """Embed a file in a page, as a URI.

    >>> data_uri(b"hello", "text/plain")
    'data:text/plain;base64,aGVsbG8='
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def html_figure(source: str, alt: str, caption: str) -> str:
    """A figure of a path or data URI, which scrolls if it is wider than the screen.

    `alt` is its alternative text; an empty caption is left out.
    """
    below = f"\n<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        '<figure><div class="scroll" role="region" tabindex="0" aria-label="picture">'
        f'<img alt="{escape(alt)}" src="{escape(source)}"></div>{below}</figure>\n'
    )
