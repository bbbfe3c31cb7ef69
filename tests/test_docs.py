"""Pages and docstrings are true: names exist, tables match the code, examples run."""

import ast
import doctest
import inspect
import json
import re
import subprocess
import sys
import zlib
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from detectron2.utils.registry import Registry
from outputs import detector_output

import dino_d2
from dino_d2.modeling import ContrastiveDenoising, HungarianMatcher, SetCriterion
from dino_d2.structures import Predictions
from dino_d2.weights.releases import table

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "dino_d2" / "README.md").read_text()
PAGES = [*ROOT.glob("*.md")] + [
    page
    for folder in ("configs", "dino_d2", "projects", "tests")
    for page in (*(ROOT / folder).rglob("*.md"), *(ROOT / folder).rglob("*.ipynb"))
]
NOTEBOOK = ROOT / "projects" / "dino" / "walkthrough.ipynb"

SOURCES = [*(ROOT / "dino_d2").rglob("*.py"), *(ROOT / "projects" / "dino").glob("*.py")]
SECTIONS = ("Args:", "Attributes:", "Returns:", "Yields:", "Raises:")
EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "dino_d2").rglob("*.py"))
    if ">>> " in path.read_text()
]


def names_in(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`(test_\w+\.py)`", PAGE))))
def test_the_tests_that_the_page_names_exist(file):
    mentions = re.findall(rf"`{file}`: ((?:`\w+`[,;]?\s*)+)", PAGE)
    names = {name for mention in mentions for name in re.findall(r"`(test_\w+)`", mention)}
    assert names <= names_in(ROOT / "tests" / file)


def test_the_code_that_the_page_names_exists():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    places = [cell for row in rows for cell in row.split("|") if ".py)" in cell]
    assert len(places) > 25
    for place in places:
        for link, names in re.findall(r"\]\(([\w/.]+\.py)\)((?:[\s,]*`\w+`)+)", place):
            assert set(re.findall(r"`(\w+)`", names)) <= names_in(ROOT / "dino_d2" / link), place


def test_the_table_of_published_checkpoints_is_that_of_the_model_zoo():
    assert table() in (ROOT / "projects" / "dino" / "MODEL_ZOO.md").read_text()


def test_negatives_are_taught_that_they_are_nothing(make_targets):
    # One box, a budget of one: query 0 is the positive, query 1 the negative.
    targets = make_targets(1)
    denoising = ContrastiveDenoising(num_classes=3, embed_dim=8, budget=1)(targets)
    denoised = Predictions(torch.zeros(1, 2, 3), torch.full((1, 2, 4), 0.5))
    matching = Predictions(torch.zeros(1, 1, 3), torch.full((1, 1, 4), 0.5))
    for x in denoised:
        x.requires_grad_()
    criterion = SetCriterion(matcher=HungarianMatcher())
    losses = criterion(detector_output([matching], None, [denoised], denoising), targets)

    sum(loss for name, loss in losses.items() if "_dn" in name).backward()
    logits, boxes = (x.grad[0] for x in denoised)
    label = targets[0].labels[0]
    assert logits[0, label] < 0 and (logits[1] > 0).all()  # descending: up, and all down
    assert boxes[0].any() and not boxes[1].any()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_summary(path):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    docs = {node: ast.get_docstring(node, clean=False) for node in nodes}
    starts = {node: doc.partition("\n")[0].strip() for node, doc in docs.items() if doc is not None}
    wrong = [node for node, start in starts.items() if not start or start.startswith(SECTIONS)]
    assert [getattr(node, "name", "the module") for node in wrong] == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_in_docstrings_are_true(name):
    results = doctest.testmod(import_module(name))
    assert results.attempted > 0 and results.failed == 0


def test_public_functions_have_examples():
    tests = [
        test for name in EXAMPLES for test in doctest.DocTestFinder().find(import_module(name))
    ]
    shown = {test.name.rpartition(".")[2] for test in tests if test.examples}
    assert len(shown) >= 10 and {"cxcywh_to_xyxy", "iou", "nearest", "plural", "rename"} <= shown


def test_the_version_is_in_one_place():
    changes = re.findall(r"^## (\d\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), flags=re.M)
    assert changes[0] == cited.group(1) == dino_d2.__version__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    files = [link.partition("#")[0] for link in links if link[0] != "#"]
    assert [file for file in files if not (page.parent / file).exists()] == []


def code_cells():
    return [x for x in json.loads(NOTEBOOK.read_text())["cells"] if x["cell_type"] == "code"]


def test_the_notebook_is_stored_without_what_it_printed():
    assert all(x["outputs"] == [] and x["execution_count"] is None for x in code_cells())


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_the_notebook_runs_from_data_to_an_exported_detector(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    layers = "MODEL.DINO.ENCODER_LAYERS", 1, "MODEL.DINO.DECODER_LAYERS", 1  # quicker to export
    monkeypatch.setattr(dino_d2, "train", partial(dino_d2.train, overrides=layers))
    values, *cells = ("".join(x["source"]) for x in code_cells())
    names = {}
    exec(values, names)
    few = {"NUM_TRAIN": 8, "NUM_VAL": 4, "EPOCHS": 2}
    assert few.keys() <= names.keys()  # all that is shortened
    names |= few
    for cell in cells:
        exec(cell, names)
    assert len(names["mine"]) == len(names["others"])
    difference = capsys.readouterr().out.splitlines()[-1]
    assert float(difference.rpartition(" ")[2]) < 1e-3, difference
    for file in ("curves.png", "model.pt2", "training/model_final.pth"):
        assert (tmp_path / "output" / "walkthrough" / file).stat().st_size > 1000


def public_names():
    """Of what configs import, and of what they name in YAML, by its registry."""
    modeling, data = import_module("dino_d2.modeling"), import_module("dino_d2.data")
    registries = [x for x in (vars(modeling) | vars(data)).values() if isinstance(x, Registry)]
    found = [part for registry in registries for _, part in registry]
    for config in (ROOT / "configs").rglob("*.py"):
        for node in ast.walk(ast.parse(config.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dino_d2"):
                module = import_module(node.module)
                found += [getattr(module, x.name) for x in node.names]
    kinds = [x for x in found if inspect.isclass(x) or inspect.isfunction(x)]
    names = {f"{x.__module__}.{x.__qualname__}" for x in kinds}
    return {x for x in names if x.startswith("dino_d2.")}  # other tests register parts, too


@pytest.mark.nightly
def test_the_site_has_all_that_configs_name_and_no_broken_link(tmp_path):
    for name in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(name, reason='`make docs` or pip install -e ".[docs]" brings it')
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-c", ROOT / "projects" / "site"]
    result = subprocess.run([*command, ROOT, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    inventory = (tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]
    described = {x.split()[0] for x in zlib.decompress(inventory).decode().splitlines()}
    names = public_names()
    assert len(names) > 60 and names <= described
