"""Parts of users, which a config imports: the page about them is run as it stands."""

import multiprocessing
import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY

import dino_d2
from dino_d2 import modeling
from dino_d2.config.imports import import_file
from dino_d2.config.overrides import apply_overrides
from dino_d2.config.styles import read_config
from dino_d2.data import AUGMENTATION_REGISTRY, generate, register
from dino_d2.engine.plan import make_plan

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "projects" / "dino" / "OWN_PARTS.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
REGISTRIES = (
    *(getattr(modeling, x) for x in vars(modeling) if x.endswith("_REGISTRY")),
    *(AUGMENTATION_REGISTRY, BACKBONE_REGISTRY),
)


@pytest.fixture(autouse=True)
def forget():
    """What a test imports and registers is gone after it."""
    before, modules, path = [dict(x) for x in REGISTRIES], set(sys.modules), list(sys.path)
    yield
    import_file.cache_clear()
    sys.path[:] = path
    for registry, known in zip(REGISTRIES, before, strict=True):
        registry._obj_map.clear()
        registry._obj_map.update(known)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def config(tmp_path):
    """The config of the page, beside its parts."""
    (tmp_path / "my_parts.py").write_text("\n\n".join(BLOCKS))
    text = re.search(r"```yaml\n(.*?)```", PAGE, flags=re.S).group(1)
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("../configs", str(ROOT / "configs")))
    return file


def test_the_page_trains_as_it_stands(config, tmp_path, clean_catalogs):
    generate(tmp_path / "data", num_train=2, num_val=1)
    name = f"{tmp_path}/data@train"
    register([name])
    cfg = read_config(str(config))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", (name,), "DATASETS.TEST", ()])
    plan = make_plan(cfg)
    model = plan.build_model()
    parts = model.query_selection, model.denoising, model.criterion, model.backbone
    names = [type(x).__name__ for x in (*parts, model.criterion.matcher)]
    assert names[:2] == ["NearQueries", "ShrinkingDenoising"]
    assert names[3:] == ["Patches", "CenterMatcher"]
    mapper, records = plan.build_mapper(True), DatasetCatalog.get(name)
    kinds = [type(x).__name__ for x in mapper.augmentations.augs]
    assert kinds[-2:] == ["Darken", "RandomRotation"]
    loss = sum(model([mapper(x) for x in records]).values())
    loss.backward()
    assert torch.isfinite(loss)

    certain = sys.modules["my_parts"].CertainMapper(
        is_train=True, augmentations=[], image_format="RGB"
    )
    records[0]["annotations"][0]["uncertain"] = True
    assert len(certain(records[0])["instances"]) == len(records[0]["annotations"]) - 1


def test_the_parts_of_the_page_are_short():
    for block in BLOCKS:
        lines = [x for x in block.splitlines() if x and "import" not in x]
        assert len(lines) <= 15, block


def test_a_file_is_imported_once_and_saved_with_its_place(config):
    first, second = (read_config(str(config)) for _ in range(2))
    assert first.IMPORTS == second.IMPORTS == [str(config.parent / "my_parts.py")]
    saved = config.parent / "output" / "config.yaml"
    saved.parent.mkdir()
    saved.write_text(first.dump())
    assert read_config(str(saved)).IMPORTS == first.IMPORTS


def test_every_program_follows_it(config):
    assert dino_d2.model_zoo.get_config(str(config)).MODEL.BACKBONE.NAME == "build_patches"
    assert "build_patches" in BACKBONE_REGISTRY


def test_a_module_may_be_named_too(tmp_path, monkeypatch):
    (tmp_path / "somewhere.py").write_text("HERE = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "config.yaml").write_text("IMPORTS: ['somewhere']")
    assert read_config(str(tmp_path / "config.yaml")).IMPORTS == ["somewhere"]
    assert import_module("somewhere").HERE == 1


@pytest.mark.parametrize("known", [False, True], ids=["can be found", "imported already"])
def test_a_file_that_python_finds_by_itself_is_no_other(config, monkeypatch, known):
    """As a worker that is given `sys.path` does."""
    monkeypatch.syspath_prepend(str(config.parent))
    if known:
        import_module("my_parts")
    assert read_config(str(config)).IMPORTS == [str(config.parent / "my_parts.py")]


def test_files_of_one_name_are_told(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "parts.py").write_text("")
        (tmp_path / folder / "config.yaml").write_text("IMPORTS: ['parts.py']")
    read_config(str(tmp_path / "a" / "config.yaml"))
    with pytest.raises(ValueError, match="there is another module 'parts': rename this file"):
        read_config(str(tmp_path / "b" / "config.yaml"))


@pytest.mark.slow
def test_a_process_that_loads_images_finds_the_file(tmp_path):
    """It is started anew, and given an object before it has read any config."""
    (tmp_path / "plain_parts.py").write_text("class Plain:\n    pass")
    (tmp_path / "config.yaml").write_text("IMPORTS: ['plain_parts.py']")
    read_config(str(tmp_path / "config.yaml"))
    plain = sys.modules["plain_parts"].Plain()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert "plain_parts.Plain" in pool.apply(repr, (plain,))


@pytest.mark.parametrize(
    ("imports", "text", "said"),
    [
        ("parts.py", None, "neither in"),
        ("json.py", "", "ImportError: there is another module 'json'"),
        ("no_such_module", None, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("parts.py", "x = 1\ny = z", "parts.py', line 2: NameError: name 'z' is not defined"),
        ("parts.py", "x = (", "SyntaxError"),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(tmp_path, imports, text, said):
    if text is not None:
        (tmp_path / imports).write_text(text)
    (tmp_path / "config.yaml").write_text(f"IMPORTS: ['{imports}']")
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_config(str(tmp_path / "config.yaml"))
    assert str(caught.value).startswith(f"IMPORTS names '{imports}'")
    assert "\n" not in str(caught.value)


def test_the_command_cannot_name_them(config):
    with pytest.raises(ValueError, match="has to be in the config file"):
        apply_overrides(read_config(str(config)), ["IMPORTS", "['other.py']"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["RandomRotatoin"], "did you mean: RandomRotation"),
        ([["RandomRotation", {"angel": 3}]], "RandomRotation: .*angel"),
        (["RandomRotation"], "RandomRotation: .*angle"),
        ([["RandomRotation", 5]], r"write a name, or \[name, {argument: value}\]"),
        ([["RandomRotation"]], "write a name"),
        ([7], "write a name"),
        (["RandomApply"], "unknown"),
        (
            [["RandomCrop", {"crop_type": "foo", "crop_size": [3, 3]}]],
            "RandomCrop: it does not take these",
        ),
    ],
)
def test_an_augmentation_that_is_none_is_one_sentence(names, said):
    with pytest.raises(ValueError, match=said):
        dino_d2.data.named_augmentations(names)


def test_augmentations_of_detectron2_take_arguments():
    for entry in (["RandomRotation", {"angle": [90, 90]}], {"RandomRotation": {"angle": [90, 90]}}):
        (turn,) = dino_d2.data.named_augmentations([entry])
        image = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
        assert turn.get_transform(image).apply_image(image).shape[:2] == (3, 2)
    (ours,) = dino_d2.data.named_augmentations([["ResizeShortestEdge", {"short_edge_length": 4}]])
    assert type(ours).__module__.startswith("dino_d2")


@pytest.mark.parametrize("text", ["IMPORTS:", "IMPORTS: []"])
def test_nothing_to_import_is_fine(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    assert read_config(str(tmp_path / "config.yaml")).IMPORTS == []


def test_what_is_no_name_is_one_sentence(tmp_path):
    (tmp_path / "config.yaml").write_text("IMPORTS: [3]")
    with pytest.raises(ValueError, match="IMPORTS has 3: name files"):
        read_config(str(tmp_path / "config.yaml"))
