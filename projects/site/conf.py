"""Sphinx's settings for `make docs`: pages and docstrings are read where they are."""

import inspect
import json
import re
from pydoc import locate

from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

import dino_d2

project = "dino_d2"
version = release = dino_d2.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".ipynb": "markdown", ".rst": "restructuredtext"}
root_doc = "README"
include_patterns = ["*.md", "configs/*.md", "dino_d2/*.md", "projects/**", "tests/*.md"]
# Not walked, either: an environment in the checkout has many thousand files.
exclude_patterns = [".*", "build", "datasets", "dist", "output"]
myst_heading_anchors = 4
highlight_language = "none"

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
napoleon_use_ivar = True  # attributes are members already
autodoc_inherit_docstrings = False  # PyTorch's are written for other pages
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

# Broken references fail the build: `:class:` of ours. Other words in backticks are links where
# they are names of ours; names with dots are types, most of them of other packages.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:obj", ".*"), ("py:class", r".*\..*")]

html_theme = "furo"
html_title = f"dino_d2 {version}"
html_copy_source = False

CONTENTS = """

```{toctree}
:hidden:
:caption: Use

projects/dino/walkthrough
projects/dino/DETECTING
projects/dino/FINE_TUNING
projects/dino/DATA
projects/dino/TRAINING
projects/dino/LARGE_TRAININGS
projects/dino/OWN_PARTS
projects/dino/EXPORT
projects/dino/MODEL_ZOO
projects/dino/BENCHMARKS
configs/README
projects/dino/README
```

```{toctree}
:hidden:
:caption: Understand and change

API reference <projects/site/api>
dino_d2/README
tests/README
CONTRIBUTING
CHANGELOG
```
"""


def read(app: Sphinx, page: str, source: list[str]) -> None:
    """Add the contents to the first page, and take the text of a notebook from its cells."""
    if page == root_doc:
        source[0] += CONTENTS
    if app.env.doc2path(page).suffix == ".ipynb":
        forms = {"markdown": "{}\n", "code": "```python\n{}\n```\n"}
        cells = json.loads(source[0])["cells"]
        source[0] = "\n".join(forms[x["cell_type"]].format("".join(x["source"])) for x in cells)


def find(app: Sphinx, env: BuildEnvironment, node: Element, content: Element) -> Element | None:
    """The place of a name that is given without its module, if only one has it."""
    if node["refdomain"] != "py":
        return None
    domain = env.domains.python_domain
    found = domain.find_obj(env, None, None, node["reftarget"], node["reftype"], searchmode=1)
    if len(found) != 1:
        return None
    name, place = found[0]
    return make_refnode(
        app.builder, node["refdoc"], place.docname, place.node_id, content, title=name
    )


def keep_blocks(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Show indented blocks of docstrings, tables and formulas, as they are."""
    lines[:] = re.sub(r"(?m)^(\S.*\n\n)(?=    )", r"\1::\n\n", "\n".join(lines)).split("\n")


def describe_field(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Of a field of a NamedTuple: the comment behind or above it, which has shape and meaning."""
    if lines and lines[0].startswith("Alias for field number"):
        owner, _, name = name.rpartition(".")
        comments = rf"((?:^    # .*\n)*)^    {name}: .*?(?:  # (.*))?$"
        found = re.search(comments, inspect.getsource(locate(owner)), flags=re.MULTILINE)
        above, behind = found.groups(default="")
        lines[:] = [behind or above.replace("    # ", "").replace("\n", " ")]


def write_index(app: Sphinx, error: Exception | None) -> None:
    """Lead from index.html, where servers look, to the first page."""
    if error is None:
        line = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">'
        (app.outdir / "index.html").write_text(line)


def setup(app: Sphinx) -> None:
    app.connect("source-read", read)
    app.connect("missing-reference", find)
    app.connect("autodoc-process-docstring", keep_blocks, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", describe_field, priority=600)
    app.connect("build-finished", write_index)
