"""Files that run without Detectron2, `export.py` that writes them and `serve_onnx.py`."""

import ast
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TinyBackbone
from detectron2.structures import ImageList
from outputs import run_detector
from PIL import Image
from torch.export import Dim
from torch.nn import functional as F

import dino_d2
from dino_d2 import modeling
from dino_d2.boxes import cxcywh_to_xyxy, refine
from dino_d2.export import Exportable, check, export, runtime, save
from dino_d2.export.differences import compare
from dino_d2.export.graph import distinct_first, nearest, to_onnx
from dino_d2.export.quantize import FLOAT, quantize
from dino_d2.export.runtime import About, Exported, ExportError, fit
from dino_d2.modeling.postprocess import postprocess
from dino_d2.modeling.relations import SUPPRESSED, PositionRelation
from dino_d2.structures import Detections, FeaturePyramid, LayerOutput, MaskDetections

PROGRAMS = Path(__file__).parents[1] / "projects" / "dino"
sys.path.insert(0, str(PROGRAMS))
import export as program  # noqa: E402
import serve_onnx  # noqa: E402
from onnx_detector import OnnxDetector  # noqa: E402

SIZE = (48, 64)
CLASSES = ["circle", "square", "star"]


@pytest.fixture
def model(make_dino, randomise):
    """One layer of each kind: exporting takes time by the operator."""
    model = make_dino(denoising=None, max_detections=20, num_layers=1)
    model.encoder.layers = model.encoder.layers[:1]
    return randomise(model, std=0.1).eval()


@pytest.fixture
def images():
    return torch.randint(256, (3, 3, *SIZE), dtype=torch.uint8)


@pytest.fixture
def image_sizes():
    """Of a whole image, of one with padding below, and of one with padding to the right."""
    return torch.tensor([[48, 64], [33, 64], [48, 41]])


@torch.no_grad()
def detect(model, images, image_sizes):
    return Detections(*Exportable(model)(images, image_sizes))


def detections(boxes, scores, labels):
    """Of one image."""
    return Detections(
        torch.tensor([boxes], dtype=torch.float32), torch.tensor([scores]), torch.tensor([labels])
    )


# ---- what a graph computes


@pytest.mark.parametrize("one_class", [False, True])
def test_images_without_padding_give_what_the_model_gives(model, images, one_class):
    model.one_class_per_query = one_class
    found = detect(model, images, torch.tensor([SIZE] * 3))
    for i, x in enumerate(model([{"image": image} for image in images])):
        expected = x["instances"]
        torch.testing.assert_close(found.boxes[i], expected.pred_boxes.tensor)
        torch.testing.assert_close(found.scores[i], expected.scores)
        assert found.labels[i].equal(expected.pred_classes)


def test_padding_is_masked_as_in_a_batch_of_the_model(model, images, image_sizes):
    sizes = [tuple(x) for x in image_sizes.tolist()]
    cut = [image[:, :h, :w] for image, (h, w) in zip(images, sizes, strict=True)]
    batch = model.preprocess_images([{"image": image} for image in cut])
    with torch.no_grad():
        predictions = run_detector(model, ImageList(batch.tensor, sizes)).result.layers[-1]
    expected = postprocess(predictions, sizes, model.max_detections)
    for box, score, x in zip(*detect(model, images, image_sizes)[:2], expected, strict=True):
        x.pred_boxes.clip(x.image_size)
        torch.testing.assert_close(box, x.pred_boxes.tensor)
        torch.testing.assert_close(score, x.scores)


def test_what_is_in_the_padding_changes_nothing(model, images, image_sizes):
    expected = detect(model, images, image_sizes)
    images[1, :, 33:] = 255
    images[2, :, :, 41:] = 0
    torch.testing.assert_close(detect(model, images, image_sizes), expected)


def test_what_nms_suppresses_comes_last_without_a_score(model, images, image_sizes):
    model.nms = 0.02
    found = detect(model, images, image_sizes)
    assert 0 < (found.scores == 0).sum() and (found.scores.diff() <= 0).all()
    (alone,) = model([{"image": images[0]}])
    kept = found.scores[0] > 0
    torch.testing.assert_close(found.boxes[0][kept], alone["instances"].pred_boxes.tensor)


def test_boxes_stay_inside_the_image(model, images, image_sizes):
    model.decoder.box_heads[0].layers[-1].bias.data[2:] = 5.0  # nearly as large as the image
    boxes = detect(model, images, image_sizes).boxes
    limit = image_sizes.flip(1).tile(2)[:, None]
    assert (boxes >= 0).all() and (boxes <= limit).all()
    assert (boxes == limit).any()


@pytest.mark.parametrize(
    ("shape", "expected"),
    # scale 0.5, 2, 0.48 (64 / 133 would not fit: 48 / 100), 0.064: 0.064 rows become one
    [((96, 100), (48, 50)), ((24, 32), (48, 64)), ((100, 133), (48, 64)), ((1, 1000), (1, 64))],
)
def test_images_keep_their_ratio_and_are_padded(shape, expected):
    image = np.full((*shape, 3), 200, np.uint8)
    padded, size = fit(image, SIZE)
    assert size == expected and padded.shape == (3, *SIZE)
    assert (padded[:, : size[0], : size[1]] == 200).all()
    assert padded.sum() == 3 * 200 * size[0] * size[1]


def test_an_image_of_the_right_size_is_not_resized():
    image = np.random.default_rng(0).integers(256, size=(*SIZE, 3), dtype=np.uint8)
    assert (fit(image, SIZE)[0] == image.transpose(2, 0, 1)).all()


def test_an_image_of_one_channel_is_resized_and_padded():
    image = np.full((96, 100, 1), 200, np.uint8)
    padded, size = fit(image, SIZE)
    assert size == (48, 50) and padded.shape == (1, *SIZE) and padded.sum() == 200 * 48 * 50


def test_padding_of_every_size_is_found_where_the_model_finds_it():
    for length in range(1, 300):
        mask = torch.rand(1, 1, length, 2 * length)
        sides = [-(-length // 2**i) for i in range(3, 7)]
        for size in [(side, 2 * side) for side in sides]:
            assert nearest(mask, size).equal(F.interpolate(mask, size=size))


@pytest.mark.parametrize("scale", [2.0, 3.0, 1.3, 0.7, (2.0, 0.4)])
def test_features_are_enlarged_by_a_factor_as_pytorch_does_it(scale):
    for length in range(5, 60):
        image = torch.rand(1, 2, length, length + 3)
        scales = list(scale) if isinstance(scale, tuple) else [scale] * 2
        assert nearest(image, None, scales).equal(F.interpolate(image, scale_factor=scale))


# ---- how far detections are apart

TWO = detections([[0, 0, 9, 9], [5, 5, 8, 8]], [0.9, 0.5], [1, 0])


def test_detections_in_another_order_are_the_same():
    turned = Detections(*(x.flip(1) for x in TWO))
    assert [x.tolist() for x in compare(TWO, turned, 0.0)] == [[0, 0]] * 3


def test_differences_are_the_largest_of_a_box_and_those_of_the_scores():
    other = detections([[0, 0, 9, 9.25], [5, 5, 8, 8]], [0.9, 0.75], [1, 0])
    boxes, scores, _ = compare(TWO, other, 0.0)
    assert boxes.tolist() == [0.25, 0] and scores.tolist() == [0, 0.25]
    assert not compare(TWO, other, 0.0).tolerable


@pytest.mark.parametrize(("box", "score", "tolerable"), [(0.4, 0, 1), (0.6, 0, 0), (0, 2e-3, 0)])
def test_half_a_pixel_and_a_thousandth_are_tolerable(box, score, tolerable):
    other = detections([[0, 0, 9, 9], [5, 5, 8, 8 + box]], [0.9, 0.5 + score], [1, 0])
    assert compare(TWO, other, 0.1).tolerable == tolerable


def test_a_detection_of_another_class_has_no_partner():
    other = TWO._replace(labels=torch.tensor([[1, 2]]))
    assert compare(TWO, other, 0.0).boxes.tolist() == [0, torch.inf]


def test_a_partner_is_nobody_elses():
    twice = detections([[0, 0, 9, 9], [0, 0, 9, 9]], [0.9, 0.9], [1, 1])
    once = detections([[0, 0, 9, 9], [4, 4, 9, 9]], [0.9, 0.9], [1, 1])
    assert sorted(compare(twice, once, 0.0).boxes.tolist()) == [0, 4]


def test_a_detection_that_only_one_side_has_is_infinitely_far():
    one = Detections(*(x[:, :1] for x in TWO))
    for pair in ((TWO, one), (one, TWO)):
        assert sorted(compare(*pair, 0.5).boxes.tolist()) == [0, torch.inf]
        assert compare(*pair, 0.6).boxes.tolist() == [0]  # the one too many scores 0.5


def test_what_scores_less_than_the_threshold_in_both_is_left_out():
    other = TWO._replace(scores=torch.tensor([[0.9, 0.7]]))
    assert len(compare(TWO, TWO, 0.6).boxes) == 1
    assert len(compare(TWO, other, 0.6).boxes) == len(compare(other, TWO, 0.6).boxes) == 2


def test_nan_is_not_tolerable():
    other = TWO._replace(boxes=TWO.boxes.clone().fill_(torch.nan))
    assert not compare(TWO, other, 0.0).tolerable


# ---- what is refused


def test_a_model_in_training_is_refused(model):
    with pytest.raises(ExportError, match="call model.eval()"):
        check(model.train(), SIZE)


def test_an_empty_size_is_refused(model):
    with pytest.raises(ExportError, match="0 x 64 pixels are empty"):
        check(model, (0, 64))


def test_a_size_that_the_backbone_would_pad_names_the_nearest(model, monkeypatch):
    monkeypatch.setattr(TinyBackbone, "size_divisibility", 32)
    check(model, (64, 96))
    with pytest.raises(ExportError, match="50 x 64 pixels .* nearest size is 64 x 64"):
        check(model, (50, 64))


def test_a_file_is_onnx_or_pt2(tmp_path):
    with pytest.raises(ExportError, match=r"'.*model.pth' has to end in .onnx or .pt2"):
        save(None, tmp_path / "model.pth", None)


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_command(name, monkeypatch, tmp_path):
    monkeypatch.setattr("dino_d2.export.runtime.find_spec", lambda x: None if x == name else True)
    monkeypatch.setattr("dino_d2.export.runtime.import_module", lambda _: None)
    with pytest.raises(ExportError, match=f"package {name}: pip install onnx onnxscript"):
        save(None, tmp_path / "model.onnx", None)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file '.*model.onnx'"):
        Exported(tmp_path / "model.onnx")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK"])
def test_what_is_no_pt2_is_said_in_one_sentence(tmp_path, content, caplog):
    (tmp_path / "model.pt2").write_bytes(content)
    with pytest.raises(ExportError, match=r"model.pt2' is damaged or not a .pt2 file: export it"):
        Exported(tmp_path / "model.pt2")
    assert not caplog.records


# ---- the files, whose making takes a while


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def done():
    """What was exported and loaded before."""
    return {}


@pytest.fixture
def exported(model, folder, done):
    """Path of the file of a kind: of the same model in all tests, as the seed is the same."""

    def exported(kind):
        path = folder / f"model{kind}"
        if not path.exists():
            if "graph" not in done:
                done["graph"] = export(model, SIZE)
            save(done["graph"], path, About(CLASSES, SIZE, "RGB", None))
        return path

    return exported


@pytest.fixture
def load(exported, done):
    def load(kind):
        if kind not in done:
            done[kind] = Exported(exported(kind))
        return done[kind]

    return load


@pytest.fixture
def int8(exported, folder, done, images, image_sizes):
    """Path of the ONNX file in INT8, and the number of its operators that are."""
    path = folder / "int8.onnx"
    if "int8" not in done:
        done["int8"] = quantize(exported(".onnx"), path, [(images, image_sizes)])
    return path, done["int8"]


KINDS = pytest.mark.parametrize("kind", [".pt2", ".onnx"])


class Suppressing(torch.nn.Module):
    """All that suppresses, or that a relation adds: in selection, between layers, at the end."""

    def __init__(self):
        super().__init__()
        self.selection = modeling.DistinctQuerySelection(
            num_queries=12, embed_dim=8, num_classes=3, iou_threshold=0.5
        )
        self.relations = torch.nn.ModuleList(
            [
                modeling.DistinctQueries(num_heads=2, iou_threshold=0.3),
                PositionRelation(num_heads=2),
            ]
        )
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens, padding):
        ratios = torch.ones_like(tokens[:, :1, :2])
        queries, (logits, boxes) = self.selection(
            FeaturePyramid(tokens, tokens, padding, ratios, ((4, 5),))
        )
        x = queries.content
        output, attended = LayerOutput(logits, refine(boxes, x[..., :4] / 4), x, boxes), []
        for relation in self.relations:
            output, mask = relation(output, None, last=False)
            attended.append(self.attention(x, x, x + 1, attn_mask=mask, need_weights=False)[0])
        scores, labels = logits.sigmoid().max(-1)
        scores, order = scores.sort(descending=True)
        corners = cxcywh_to_xyxy(boxes).gather(1, order[..., None].expand(-1, -1, 4))
        found = Detections(corners, scores, labels.gather(1, order))
        found = distinct_first(found, 0.3)
        kept = found.scores > 0  # the others come in any order
        return *attended, output.logits, found.scores, found.boxes * kept[..., None]


@pytest.mark.slow
def test_onnx_suppresses_as_the_model_does_and_has_relations(randomise):
    module = randomise(Suppressing()).eval()
    module.selection.box_head.layers[-1].bias.data[2:] = 3.5  # so that boxes overlap
    inputs = torch.randn(3, 20, 8), torch.zeros(3, 20, dtype=torch.bool)
    axes = {0: Dim("batch", min=1)}
    with torch.no_grad():
        expected = module(*inputs)
        graph = torch.export.export(module, inputs, dynamic_shapes=(axes, axes))
    *_, logits, scores, _ = expected
    assert ((logits == SUPPRESSED).all(-1).sum(1) > 0).all() and ((scores == 0).sum(1) > 0).all()
    file = to_onnx(graph)
    for count in (1, 3):
        for a, b in zip(file(*(x[:count] for x in inputs)), expected, strict=True):
            torch.testing.assert_close(a, b[:count], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@KINDS
def test_a_file_gives_what_the_model_gives_for_any_number_of_images(
    load, model, images, image_sizes, kind
):
    file = load(kind)
    assert file.about == About(CLASSES, SIZE, "RGB", None)
    for count in (1, 2, 3):
        batch = images[-count:], image_sizes[-count:]
        boxes, scores, _ = compare(detect(model, *batch), file(*batch), 0.0)
        assert len(boxes) == count * model.max_detections
        assert boxes.max() < 1e-3 and scores.max() < 1e-5


@pytest.mark.slow
@KINDS
def test_a_file_says_what_images_it_takes(load, images, image_sizes, kind):
    file = load(kind)
    sentence = r"should be \(3, 3, 48, 64\) of uint8: resized and padded to 48 x 64"
    for wrong in (images[:, :, :40], images[:, :1], images.float()):
        with pytest.raises(ExportError, match=sentence):
            file(wrong, image_sizes)
    with pytest.raises(ExportError, match=r"\(0, 3, 48, 64\).* should be \(1, 3, 48, 64\)"):
        file(images[:0], image_sizes[:0])
    for wrong in (image_sizes + 1, image_sizes - 33):
        with pytest.raises(ExportError, match="at most 48 and 64"):
            file(images, wrong)
    for wrong in (image_sizes[:2], image_sizes.tile(2)[:, :3], image_sizes.float()):
        with pytest.raises(ExportError, match=r"should be \(3, 2\) of int64: height and width"):
            file(images, wrong)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_is_said_in_one_sentence(exported, tmp_path, kind, damage, caplog):
    content = bytearray(exported(kind).read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        at = content.find(b"encoder.layers.0.self_attn")
        content[at - 200 : at] = bytes(200)
    path = tmp_path / f"model{kind}"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=f"model{kind}' is damaged or not an? ") as refused:
        Exported(path)
    assert "\n" not in str(refused.value) and not caplog.records


@pytest.mark.slow
def test_onnx_has_standard_operators_and_names_of_modules(exported):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(exported(".onnx"))
    assert [(x.domain, x.version) for x in graph.opset_import] == [("", 18)]
    assert {node.domain for node in graph.graph.node} == {""} and not graph.functions
    assert "Resize" not in {node.op_type for node in graph.graph.node}  # see `nearest`
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    samples = [name for name in names if "GridSample" in name]
    assert len(samples) == 4 + 4  # levels, of encoder and decoder
    assert samples[0].startswith("encoder.layers.0.self_attn/")
    assert samples[-1].startswith("decoder.layers.0.cross_attn/")
    shapes = {
        x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
        for x in (*graph.graph.input, *graph.graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, 48, 64],
        "image_sizes": ["batch", 2],
        "boxes": ["batch", 20, 4],
        "scores": ["batch", 20],
        "labels": ["batch", 20],
    }


class Corners(torch.nn.Module):
    """A graph with what goes in and comes out of a detector, and nothing between."""

    def forward(self, images, image_sizes):
        sizes = image_sizes.float()
        return images[:, 0, :2, :4] * sizes[:, :1, None], sizes, image_sizes * 2


@pytest.mark.slow
def test_onnx_keeps_a_fixed_number_of_images(tmp_path):
    onnx = pytest.importorskip("onnx")
    inputs = torch.zeros(2, 3, *SIZE, dtype=torch.uint8), torch.tensor([SIZE] * 2)
    path = tmp_path / "model.onnx"
    save(torch.export.export(Corners(), inputs), path, About(CLASSES, SIZE, "RGB", 2))
    graph = onnx.load(path).graph
    first = [x.type.tensor_type.shape.dim[0].dim_value for x in (*graph.input, *graph.output)]
    assert first == [2] * 5


@pytest.mark.slow
def test_onnx_has_no_path_of_the_machine_that_wrote_it(exported):
    content = exported(".onnx").read_bytes()
    for path in (Path(dino_d2.__file__).parent, Path(torch.__file__).parent):
        assert str(path).encode() not in content


@pytest.mark.slow
def test_pt2_runs_without_this_package(exported, model, images, image_sizes, tmp_path):
    script = (
        "import sys, torch\n"
        "graph = torch.export.load(sys.argv[1]).module()\n"
        "torch.save(graph(*torch.load(sys.argv[2])), sys.argv[2])\n"
        "assert not {'dino_d2', 'detectron2'} & set(sys.modules)\n"
    )
    torch.save((images, image_sizes), tmp_path / "tensors")
    words = [sys.executable, "-c", script, str(exported(".pt2")), str(tmp_path / "tensors")]
    subprocess.run(words, check=True, cwd=tmp_path)
    found = Detections(*torch.load(tmp_path / "tensors"))
    torch.testing.assert_close(found, detect(model, images, image_sizes), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_operator_may_stay_and_the_number_of_images_be_fixed(
    model, images, image_sizes, tmp_path, recwarn
):
    graph = export(model, SIZE, batch_size=3, keep_operator=True)
    assert "dino_d2.ms_deform_attn" in str(graph.graph)
    save(graph, tmp_path / "model.pt2", About(CLASSES, SIZE, "RGB", 3))
    assert not [x for x in recwarn if "No complete tensor" in str(x.message)]
    file = Exported(tmp_path / "model.pt2")
    torch.testing.assert_close(file(images, image_sizes), detect(model, images, image_sizes))
    with pytest.raises(ExportError, match=r"\(2, 3, 48, 64\).* should be \(3, 3, 48, 64\)"):
        file(images[:2], image_sizes[:2])


@pytest.mark.slow
def test_a_backbone_that_counts_images_needs_a_fixed_number(model, monkeypatch):
    forward = TinyBackbone.forward

    def count(self, x):
        return forward(self, x * (int(x.shape[0] / 0.5) > 0))

    monkeypatch.setattr(TinyBackbone, "forward", count)
    with pytest.raises(ExportError, match="fix it, with --batch-size 1 or batch_size=1"):
        export(model, SIZE)


@pytest.mark.slow
@KINDS
def test_a_file_of_somebody_else_is_refused(tmp_path, kind):
    path = tmp_path / f"other{kind}"
    other = torch.export.export(torch.nn.ReLU(), (torch.zeros(1),))
    if kind == ".pt2":
        torch.export.save(other, path)
    else:
        torch.onnx.export(other, f=path, verbose=False)
    with pytest.raises(ExportError, match="was not written by dino_d2"):
        Exported(path)


# ---- export.py


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(60, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def run(model, picture, monkeypatch):
    """The program with a small model in place of the config's, in the folder of the picture."""
    predictor = dino_d2.Predictor(model, classes=CLASSES, augmentations=[], image_format="RGB")
    monkeypatch.setattr(dino_d2, "load", lambda *_: predictor)
    monkeypatch.chdir(picture.parent)

    def run(*words):
        words = ["--config-file", "x", "--size", "48", "64", *words]
        if "--images" not in words:
            words += ["--images", "picture.png"]
        monkeypatch.setattr(sys, "argv", ["export.py", *words])
        try:
            program.main()
        except SystemExit as end:
            return str(end.code)
        return None

    return run


@pytest.fixture
def pretend(model, monkeypatch):
    """Nothing is exported; what runs in place of a file is the model, its scores shifted."""

    def pretend(shift=0.0, of=model):
        def run_file(images, image_sizes):
            found = detect(of, images, image_sizes)
            return found._replace(scores=found.scores + shift)

        monkeypatch.setattr(program, "export", lambda *_: None)
        monkeypatch.setattr(program, "save", lambda graph, path, about: path.write_text("graph"))
        monkeypatch.setattr(program, "Exported", lambda path: run_file)

    return pretend


LOW = ("--confidence-threshold", "0")


def test_a_file_gets_its_name_when_it_was_compared(run, pretend, capsys):
    pretend()
    assert run("--output", "new/model.pt2", *LOW) is None
    assert [x.name for x in Path("new").iterdir()] == ["model.pt2"]
    assert "20 detections compared" in capsys.readouterr().out


def test_a_file_that_differs_does_not_get_its_name(run, pretend):
    pretend(shift=0.002)
    Path("model.pt2").write_text("before")
    message = run("--output", "model.pt2", *LOW)
    assert message.startswith("export.py: that is more than 0.5 pixels, 0.001 of a score")
    assert "'model.unverified.pt2' is kept" in message
    assert Path("model.pt2").read_text() == "before" and Path("model.unverified.pt2").exists()


def test_without_a_detection_nothing_is_exported(run, monkeypatch):
    monkeypatch.setattr(program, "export", lambda *_: pytest.fail("in vain"))
    message = run("--output", "model.pt2", "--confidence-threshold", "0.999")
    assert "no detection in these images scores 0.999 or more" in message
    assert not list(Path().glob("*.pt2"))


def test_a_fixed_number_of_images_is_filled_up(picture):
    image = np.asarray(Image.open(picture))
    batches = program.make_batches([image] * 3, SIZE, 2)
    assert [x.shape for x, _ in batches] == [(2, 3, *SIZE)] * 2
    assert [len(x) for x, _ in program.make_batches([image] * 4, SIZE, None)] == [3, 1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--output", "model.pth"], "'model.pth' has to end in .onnx or .pt2"),
        (["--images", "pictur.png"], "did you mean: 'picture.png'"),
        (["--images", "empty"], "--images 'empty'"),
        (["--output", "empty.pt2"], "--output 'empty.pt2' is a folder: name a file"),
        (["--images", "text.png"], "image 'text.png' cannot be read"),
        (["--size", "0", "64"], "images of 0 x 64 pixels are empty"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(run, words, sentence):
    Path("empty").mkdir()
    Path("empty.pt2").mkdir()
    Path("text.png").write_text("no image")
    message = run("--output", "model.pt2", *words)
    assert message.startswith("export.py: ") and "\n" not in message
    assert sentence in message


@pytest.mark.parametrize(
    "words",
    [["--batch-size", "0"], ["--keep-operator"], ["--confidence-threshold", "50"]],
    ids=["no image", "operator in ONNX", "percent"],
)
def test_impossible_arguments_are_refused(run, words, capsys):
    assert run("--output", "model.onnx", *words) == "2"
    assert words[0] in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_program_compares_is_the_file(run, exported, monkeypatch):
    monkeypatch.setattr(program, "export", lambda *_: None)
    monkeypatch.setattr(program, "save", lambda _, path, about: shutil.copy(file, path))
    file = exported(".pt2")
    assert run("--output", "model.pt2", *LOW) is None
    assert Path("model.pt2").read_bytes() == file.read_bytes()


def test_a_model_that_cannot_be_exported_is_said_in_one_sentence(run, monkeypatch):
    def refuse(*_):
        raise ExportError("it counts")

    monkeypatch.setattr(program, "export", refuse)
    assert run("--output", "model.pt2") == "export.py: it counts"


@pytest.mark.parametrize("folder", ["/proc", "/dev/null", "/dev/null/new"])
def test_where_nothing_can_be_written_is_said_before_the_work(run, monkeypatch, folder):
    monkeypatch.setattr(program, "export", lambda *_: pytest.fail("in vain"))
    message = run("--output", f"{folder}/model.pt2", *LOW)
    assert message.startswith(f"export.py: nothing can be written into '{folder}': name another")


def test_the_exporter_does_not_warn_of_what_it_cannot_fold(run, pretend, monkeypatch, caplog):
    pretend()
    caplog.set_level("WARNING", "onnxscript")  # and back to what it was after the test
    logger = logging.getLogger("onnxscript.optimizer._constant_folding")
    monkeypatch.setattr(program, "export", lambda *_: logger.warning("Skipping"))
    assert run("--output", "model.pt2", *LOW) is None
    assert not caplog.records


def test_a_full_disk_is_said_in_one_sentence(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(program, "export", lambda *_: None)
    monkeypatch.setattr(program, "save", full)
    message = run("--output", "model.pt2", *LOW)
    assert message == "export.py: [Errno 28] No space left on device"


def test_an_image_whose_name_looks_like_a_pattern_is_found(run, pretend, picture):
    pretend()
    picture.rename("a[1].png")
    assert run("--output", "model.pt2", *LOW, "--images", "a[1].png") is None


def test_the_model_runs_once_on_each_batch_as_the_file_does(run, pretend, monkeypatch):
    pretend()
    counts = []
    padded = program.padded
    monkeypatch.setattr(program, "padded", lambda *x: counts.append(1) or padded(*x))
    assert run("--output", "model.pt2", *LOW) is None
    assert counts == [1]


# ---- INT8 and bfloat16, and OpenVINO


@pytest.mark.slow
def test_int8_is_where_it_does_no_harm(int8, load, images, image_sizes):
    onnx = pytest.importorskip("onnx")
    path, count = int8
    nodes = onnx.load(path).graph.node
    dequantized = {x.output[0]: x for x in nodes if x.op_type == "DequantizeLinear"}
    weighted = [x for x in nodes if x.op_type in ("Conv", "Gemm", "MatMul")]
    narrow = [x.name for x in weighted if set(x.input[:2]) <= dequantized.keys()]
    # The neck, and of both layers value_proj, output_proj and the two of the FFN, in the decoder
    # out_proj of self-attention as well; not what sees pixels.
    assert next(x for x in weighted if x.op_type == "Conv").name not in narrow
    assert len(narrow) == count > 8 and not any(map(FLOAT.search, narrow))
    for part in ("value_proj", "output_proj", "ffn", "neck"):
        assert any(part in x for x in narrow), part
    for part in ("sampling_offsets", "attention_weights", "box_head", "class_head"):
        kept = [x for x in weighted if part in x.name]
        assert kept and not any(dequantized.keys() & x.input for x in kept), part
    file = Exported(path)
    assert file.about == load(".onnx").about
    found, expected = file(images, image_sizes), load(".onnx")(images, image_sizes)
    assert (found.scores - expected.scores).abs().max() < 0.05


# OpenVINO's tests are run by themselves: in one process with hundreds of others, a later one that
# trains was killed without a word, twice of two times; the cause is not known.
@pytest.mark.nightly
def test_openvino_gives_what_onnx_runtime_gives(exported, load, int8, images, image_sizes):
    pytest.importorskip("openvino")
    expected = load(".onnx")(images, image_sizes)
    file = Exported(exported(".onnx"), "openvino")
    assert file.about == load(".onnx").about
    assert compare(expected, file(images, image_sizes), 0.0).tolerable
    assert file(images[:1], image_sizes[:1]).boxes.shape == (1, 20, 4)
    narrow = Exported(exported(".onnx"), "openvino", torch.bfloat16)(images, image_sizes)
    small = Exported(int8[0], "openvino")(images, image_sizes)
    for found in (narrow, small):
        assert (found.scores - expected.scores).abs().max() < 0.05
    predictor = dino_d2.load(exported(".onnx"), runtime="openvino", dtype=torch.bfloat16)
    assert predictor.classes == CLASSES and len(predictor(np.zeros((30, 40, 3), np.uint8)))


@pytest.mark.nightly
@pytest.mark.parametrize("name", runtime.RUNTIMES)
def test_a_runtime_says_of_a_broken_file_that_it_is_damaged(tmp_path, name):
    pytest.importorskip(name)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="damaged or not an ONNX file"):
        Exported(tmp_path / "model.onnx", name)


@pytest.mark.parametrize(
    ("file", "options", "said"),
    [
        ("model.onnx", ("tensorrt",), "not run in 'tensorrt': it can in onnxruntime or openvino"),
        ("model.pt2", ("openvino",), "not run in 'openvino': it can in torch"),
        ("model.pt2", ("", torch.bfloat16), "in torch as it was exported: leave out torch.bfloat"),
        ("model.onnx", ("onnxruntime", torch.float16), "in onnxruntime as it was exported"),
        ("model.onnx", ("openvino", torch.float16), "in openvino as it was exported"),
    ],
)
def test_a_runtime_that_is_not_for_a_file_is_refused(tmp_path, file, options, said):
    (tmp_path / file).touch()
    with pytest.raises(ExportError, match=said):
        Exported(tmp_path / file, *options)


@pytest.mark.parametrize("missing", runtime.RUNTIMES)
def test_a_runtime_that_is_not_installed_is_named_with_its_command(monkeypatch, tmp_path, missing):
    (tmp_path / "model.onnx").touch()
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=f"needs the package {missing}: pip install .*{missing}"):
        Exported(tmp_path / "model.onnx", missing)


def test_without_onnx_runtime_openvino_is_taken(monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", lambda name: name == "openvino" or None)
    assert runtime.runtime_of(Path("model.onnx"), "") == "openvino"
    assert runtime.runtime_of(Path("model.pt2"), "") == "torch"


def test_a_runtime_is_for_exported_files():
    with pytest.raises(ValueError, match="a runtime is for exported files: leave out 'openvino'"):
        dino_d2.load("output/mine", runtime="openvino")


def test_a_graph_in_bfloat16_is_the_model_in_mixed_precision(model, images, image_sizes):
    with torch.no_grad():
        found = Detections(*Exportable(model, torch.bfloat16)(images, image_sizes))
        with torch.autocast("cpu", torch.bfloat16):
            pixels = (images.float() - model.pixel_mean) / model.pixel_std
            same = model([{"image": images[0]}])[0]["instances"]
    assert pixels.dtype == found.boxes.dtype == torch.float32
    torch.testing.assert_close(found.scores[0], same.scores, rtol=1e-2, atol=1e-3)
    assert not found.scores.equal(detect(model, images, image_sizes).scores)


@pytest.mark.slow
def test_bfloat16_is_in_the_graph(model, images, image_sizes, tmp_path):
    graph = export(model, SIZE, 3, dtype=torch.bfloat16)
    kinds = {x.meta["val"].dtype for x in graph.graph.nodes if x.target is torch.ops.aten.addmm}
    kinds |= {
        x.meta["val"].dtype
        for x in graph.graph.nodes
        if x.target in (torch.ops.aten.addmm.default, torch.ops.aten.linear.default)
    }
    assert torch.bfloat16 in kinds
    save(graph, tmp_path / "model.pt2", About(CLASSES, SIZE, "RGB", 3))
    found = Exported(tmp_path / "model.pt2")(images, image_sizes)
    expected = Exportable(model, torch.bfloat16)(images, image_sizes)
    torch.testing.assert_close(found.scores, expected[1], rtol=1e-2, atol=1e-3)


@pytest.fixture
def validation(tmp_path):
    """The options for validation data of one image with one circle in it."""
    image = {"id": 1, "file_name": "picture.png", "width": 60, "height": 60}
    box = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 30, 20], "area": 600}
    categories = [{"id": 7 + i, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": [image], "annotations": [box | {"iscrowd": 0}], "categories": categories}
    (tmp_path / "val.json").write_text(json.dumps(content))
    return "--val-json", str(tmp_path / "val.json"), "--val-images", str(tmp_path)


INT8 = ("--int8", "--calibration", "picture.png")


@pytest.mark.parametrize(("loss", "named"), [(0.4, True), (0.5, False), (-3.0, True)])
def test_an_int8_file_gets_its_name_by_its_ap(
    run, pretend, validation, monkeypatch, capsys, loss, named
):
    pretend()
    after = {"openvino": {"bbox": 50.0, "segm": 40.0 - loss}}
    float32 = {"bbox": 50.0, "segm": 40.0}
    found = lambda path, name, runtime="": after.get(runtime, float32)  # noqa: E731
    monkeypatch.setattr(program, "average_precisions", found)
    monkeypatch.setattr(program, "installed", lambda path: ["onnxruntime", "openvino"])
    given = []
    monkeypatch.setattr(program, "quantize", lambda *x: given.append(x) or 12)
    message = run("--output", "model.onnx", *LOW, *INT8, *validation)
    ((source, target, batches),) = given
    assert source == target == Path("model.unverified.onnx")
    assert [x.shape for x, _ in batches] == [(1, 3, *SIZE)]
    told = capsys.readouterr().out
    assert "12 convolutions and linear layers are in INT8" in told
    assert "onnxruntime: AP of bbox 50.00 in float32, 50.00 in this file" in told
    assert f"openvino: AP of segm 40.00 in float32, {40 - loss:.2f} in this file" in told
    assert Path("model.onnx").exists() == named
    if not named:
        assert "that is 0.5 or more below: 'model.unverified.onnx' is kept" in message


def test_a_bfloat16_file_is_exported_again(run, pretend, validation, monkeypatch):
    pretend()
    monkeypatch.setattr(program, "average_precisions", lambda *_: {"bbox": 50.0})
    dtypes = []
    monkeypatch.setattr(program, "export", lambda *x: dtypes.append(x[-1]))
    assert run("--output", "model.pt2", *LOW, "--bf16", *validation) is None
    assert dtypes == [torch.float32, torch.bfloat16]


def test_ap_of_a_file_is_that_of_its_data(validation, picture, monkeypatch):
    class Perfect:
        about = About(CLASSES, SIZE, "RGB", None)
        graph = SimpleNamespace(device=torch.device("cpu"))

        def __call__(self, images, sizes):
            boxes = torch.tensor([[[10.0, 10, 40, 30], [0, 0, 5, 5]]]) * (sizes[0, 0] / 60)
            return Detections(boxes, torch.tensor([[0.9, 0.1]]), torch.tensor([[0, 1]]))

    monkeypatch.setattr(runtime, "Exported", lambda *_: Perfect())
    args = program.argument_parser().parse_args(
        ["--output", "x", "--size", "1", "1", "--images", "x", *validation]
    )
    name = program.validation_set(args, CLASSES)
    assert program.average_precisions(Path("x"), name) == {"bbox": pytest.approx(100)}
    with pytest.raises(
        ValueError, match="validation data has the classes .*'circle'.* the model .*'dog'"
    ):
        program.validation_set(args, ["dog"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "model.pt2", *INT8], "--int8 is for .onnx files"),
        (["--output", "model.onnx", "--bf16"], "--runtime openvino --dtype bfloat16"),
        (["--output", "model.onnx", "--int8"], "--int8 and --calibration IMAGES go together"),
        (["--output", "model.onnx", *INT8], "go together with validation data: --data"),
        (["--output", "model.pt2", "--bf16"], "go together with validation data: --data"),
        (["--output", "model.pt2", "--data", "x"], "go together with validation data: --data"),
        (["--output", "model.pt2", "--val-json", "x"], "--val-json and --val-images go together"),
        (
            ["--output", "m.pt2", "--val-json", "x", "--val-images", "x", "--data", "x"],
            "--data and --val-json exclude",
        ),
    ],
)
def test_options_of_narrow_files_go_together(run, words, said, capsys):
    assert run(*words) == "2"
    assert said in " ".join(capsys.readouterr().err.split())


def test_some_of_many_images_calibrate():
    paths = [Path(str(i)) for i in range(1000)]
    some = program.spread(paths)
    assert len(some) == 64 and some[0] == paths[0] and some[-1] == paths[984]
    assert program.spread(paths[:10]) == paths[:10]


# ---- dino_d2.load


@pytest.mark.slow
@KINDS
def test_an_exported_file_is_loaded_as_a_training_is(exported, load, picture, kind, monkeypatch):
    predictor = dino_d2.load(exported(kind))
    assert predictor.classes == CLASSES and predictor.image_format == "RGB"
    wide = np.zeros((20, 100, 3), np.uint8)
    square, strip = predictor([picture, wide])
    assert square.image_size == (60, 60) and strip.image_size == (20, 100)
    assert (strip.pred_boxes.tensor <= torch.tensor([100, 20, 100, 20])).all()
    array, size = fit(np.asarray(Image.open(picture)), SIZE)
    boxes, scores, labels = load(kind)(torch.from_numpy(array)[None], torch.tensor([size]))
    kept = (boxes[0, :, 2:] > boxes[0, :, :2]).all(-1)
    close = {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(square.pred_boxes.tensor, boxes[0, kept] * (60 / 48), **close)
    torch.testing.assert_close(square.scores, scores[0, kept], rtol=1e-4, atol=1e-5)
    assert square.pred_classes.equal(labels[0, kept])
    least = float(square.scores.median())
    monkeypatch.setattr(runtime, "Exported", lambda *_: load(kind))  # which takes seconds to read
    assert (dino_d2.load("", exported(kind), thresholds=least)(picture).scores >= least).all()


ALONE = """
import sys
import numpy as np
sys.modules["detectron2"] = None
import dino_d2
image = np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3)
for path in sys.argv[1:]:
    found = dino_d2.load(path)(image, threshold=0.1)
    print([type(found).__module__, *found.image_size, *found.pred_boxes.tensor[0].tolist()])
"""


@pytest.mark.slow
def test_an_exported_file_needs_no_detectron2(exported, tmp_path):
    paths = [str(exported(kind)) for kind in (".pt2", ".onnx")]
    words = [sys.executable, "-c", ALONE, *paths]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    image = np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3)
    for path, line in zip(paths, ran.stdout.splitlines(), strict=True):
        module, height, width, *box = ast.literal_eval(line)
        expected = dino_d2.load(path)(image, threshold=0.1)
        assert (module, height, width) == ("dino_d2.instances", 60, 80)
        assert box == pytest.approx(expected.pred_boxes.tensor[0].tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"overrides": ["TEST.NMS", 0.5]}, "no config to name or change"),
        ({"weights": "other.onnx"}, "no config to name or change"),
        ({"device": "cpu:1"}, "runs on cpu: name no other device"),
        ({"device": "gpu"}, "PyTorch does not know"),
        ({"thresholds": {"dog": 0.5}}, "there is a threshold for 'dog'"),
    ],
    ids=str,
)
def test_an_exported_file_is_as_it_is(monkeypatch, options, said):
    about = About(CLASSES, SIZE, "RGB", None)
    graph = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(runtime, "Exported", lambda *_: SimpleNamespace(about=about, graph=graph))
    with pytest.raises(ValueError, match=said):
        dino_d2.load("model.onnx", **options)


def test_an_exported_file_may_be_a_url(monkeypatch):
    about, asked = About(CLASSES, SIZE, "RGB", None), []
    file = SimpleNamespace(about=about, graph=SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(runtime, "Exported", lambda path, *_: asked.append(path) or file)
    monkeypatch.setattr(dino_d2.predictor, "fetch", lambda url: f"/cache/{url[8:]}")
    dino_d2.load("https://a/model.onnx")
    assert asked == [Path("/cache/a/model.onnx")]


def test_an_exported_file_brings_its_thresholds_and_fixed_number_of_images(monkeypatch, model):
    about = About(CLASSES, SIZE, "RGB", 2, {CLASSES[0]: 0.4})

    class File(SimpleNamespace):
        def __call__(self, images, image_sizes):
            assert len(images) == 2
            return detect(model, images, image_sizes)

    graph = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(runtime, "Exported", lambda *_: File(about=about, graph=graph))
    predictor = dino_d2.load("MODEL.ONNX")
    assert predictor([]) == [] and predictor.thresholds == {CLASSES[0]: 0.4}
    images = [np.full((30, 30 + i, 3), 60 * i, np.uint8) for i in range(3)]
    together = predictor(images)
    for image, found in zip(images, together, strict=True):
        torch.testing.assert_close(predictor(image).scores, found.scores, rtol=1e-4, atol=1e-5)


def test_masks_of_an_exported_file_are_of_the_image():
    # A mask of the left half of an image of 40 x 60, at 20 x 30 in a padded one of 32 x 32.
    maps = torch.full((1, 8, 8), -9.0)
    maps[..., :4] = 9.0
    boxes = torch.tensor([[0.0, 0.0, 15.0, 20.0]])
    found = MaskDetections(boxes, torch.tensor([0.9]), torch.tensor([1]), maps)
    instances = runtime.in_pixels(found, (20, 30), (40, 60), (32, 32))
    assert instances.pred_boxes.tensor.tolist() == [[0.0, 0.0, 30.0, 40.0]]
    mask = instances.pred_masks[0]
    assert mask.shape == (40, 60) and mask[:, :28].all() and not mask[:, 36:].any()


# ---- serve_onnx.py


@pytest.fixture
def serve(exported, tmp_path):
    """Starts the server of a model of RGB or BGR; returns what waits for its address."""
    onnx = pytest.importorskip("onnx")
    processes = []

    def serve(image_format):
        graph = onnx.load(exported(".onnx"))
        notes = {x.key: x.value for x in graph.metadata_props}
        notes["image_format"] = json.dumps(image_format)
        onnx.helper.set_model_props(graph, notes)
        onnx.save(graph, tmp_path / f"{image_format}.onnx")
        words = [sys.executable, PROGRAMS / "serve_onnx.py", tmp_path / f"{image_format}.onnx", "0"]
        words += ["--confidence-threshold", "0.3"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return lambda: process.stdout.readline().strip()

    yield serve
    for process in processes:
        process.terminate()
        process.communicate()


@pytest.mark.slow
def test_the_server_answers_what_the_model_detects(serve, model, picture):
    servers = {image_format: serve(image_format) for image_format in ("RGB", "BGR")}
    for image_format, listening in servers.items():
        address = listening()
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, picture.read_bytes()) as answer:
            found = json.load(answer)

        array, size = fit(np.asarray(Image.open(picture)), SIZE)
        array = array if image_format == "RGB" else array[::-1].copy()
        boxes, scores, labels = detect(model, torch.from_numpy(array)[None], torch.tensor([size]))
        sure = scores >= 0.3
        names = [CLASSES[i] for i in labels[sure]]
        boxes = boxes[sure] * (60 / 48)  # from pixels of the input to those of the picture
        assert len(found) == len(names) > 0 and {*found[0]} == {"class", "score", "box"}
        expected = [*zip(names, scores[sure].tolist(), boxes.tolist(), strict=True)]
        for x in found:  # ranks may change places
            assert any(
                x["class"] == name
                and x["score"] == pytest.approx(score, abs=1e-5)
                and x["box"] == pytest.approx(box, abs=1e-3)
                for name, score, box in expected
            )


class TwoImages:
    """The session of a file for two images at a time."""

    def __init__(self, model):
        self.model = model

    def run(self, _, inputs):
        assert inputs["images"].shape == (2, 3, *SIZE)
        assert inputs["image_sizes"].shape == (2, 2)
        found = detect(self.model, *(torch.from_numpy(x.copy()) for x in inputs.values()))
        return [x.numpy() for x in found]


def test_the_detector_fills_a_fixed_number_of_images(model, picture):
    detector = object.__new__(OnnxDetector)
    detector.session = TwoImages(model)
    detector.about = About(CLASSES, SIZE, "BGR", 2)._asdict()
    found = detector(Image.open(picture), 0.4)
    array, size = fit(np.asarray(Image.open(picture))[..., ::-1], SIZE)
    scores = detect(model, torch.from_numpy(array)[None], torch.tensor([size])).scores
    assert [x["score"] for x in found] == pytest.approx(scores[scores >= 0.4].tolist(), abs=1e-5)
    assert found


STAND_IN = """
import sys
import numpy as np

class InferenceSession:
    def __init__(self, path, providers):
        sys.modules["__main__"].Handler.timeout = 3600  # whom a silent client blocks, it blocks
        if "damaged" in path:
            raise RuntimeError("cannot be read")
        notes = dict(size="[48, 64]", image_format='"RGB"', batch_size="null", classes='["cell"]')
        self.custom_metadata_map = {} if "other" in path else notes

    def get_modelmeta(self):
        return self

    def run(self, _, inputs):
        return np.float32([[[0, 0, 48, 48]]]), np.float32([[0.5]]), np.int64([[0]])
"""


@pytest.fixture
def start(tmp_path):
    """Starts the server with a stand-in for onnxruntime, which takes a second to import."""
    (tmp_path / "onnxruntime.py").write_text(STAND_IN)
    processes = []

    def start(*words):
        words = [sys.executable, PROGRAMS / "serve_onnx.py", *words]
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        processes.append(subprocess.Popen(words, **pipes, env=env, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def post(address, content):
    """Status and answer."""
    try:
        with urllib.request.urlopen(address, content, timeout=600) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)


def test_a_client_that_sends_too_little_blocks_nobody(start, picture):
    address = start("model.onnx", "0").stdout.readline().strip()
    with socket.create_connection(address.removeprefix("http://").split(":")) as silent:
        silent.sendall(b"POST / HTTP/1.0\r\nContent-Length: 100\r\n\r\nx")
        answer = [{"class": "cell", "score": 0.5, "box": [0, 0, 60, 60]}]
        assert post(address, picture.read_bytes()) == (200, answer)


def test_a_client_that_stays_silent_is_refused(monkeypatch):
    assert 0 < serve_onnx.Handler.timeout <= 60
    monkeypatch.setattr(serve_onnx.Handler, "timeout", 0.1)
    client, server = socket.socketpair()
    with client, server:
        client.sendall(b"POST / HTTP/1.0\r\nContent-Length: 100\r\n\r\nx")
        serve_onnx.Handler(server, ("client", 0), None)
        assert client.recv(100).startswith(b"HTTP/1.0 400")


def test_the_server_refuses_what_is_no_image_of_8_bits(start, picture):
    address = start("model.onnx", "0").stdout.readline().strip()
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(deep := io.BytesIO(), "PNG")
    whole = picture.read_bytes()
    for upload in (b"no image", b"", whole[:2000], deep.getvalue()):
        status, answer = post(address, upload)
        assert status == 400 and "not a complete image with 8 bits" in answer["error"]
    with urllib.request.urlopen(address, timeout=600) as answer:  # a GET, as of a browser
        assert b"post an image" in answer.read()


def test_the_server_ends_at_control_c_without_a_trace(start):
    # A shell has what runs in the background ignore the signal, and so would the server.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start("model.onnx", "0")
    signal.signal(signal.SIGINT, handler)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=600)[1] == "" and process.returncode == 0


def test_the_server_says_what_is_wrong_in_one_sentence(start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        used = str(other.getsockname()[1])
        wrong = {
            ("model.onnx", used): f"port {used} cannot be used, name another: [Errno",
            ("model.onnx", "99999"): "port 99999 cannot be used, name another",
            ("damaged.onnx",): "'damaged.onnx' was not written by export.py: cannot be read",
            ("other.onnx",): "'other.onnx' was not written by export.py: its notes are missing",
            ("model.onnx", "x"): "argument port: invalid int value: 'x'",
            (): "the following arguments are required: file",
        }
        processes = {words: start(*words) for words in wrong}
        for words, sentence in wrong.items():
            error = processes[words].communicate(timeout=600)[1]
            assert sentence in error.splitlines()[-1] and "Traceback" not in error
            assert processes[words].returncode


def test_the_server_names_the_package_that_is_missing(start, tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError")
    error = start("model.onnx").communicate()[1]
    assert error == "serve_onnx.py: onnxruntime is missing: pip install onnxruntime\n"


class Gray(torch.nn.Module):
    """Boxes of an image, with its first gray values as their scores."""

    def forward(self, images, image_sizes):
        boxes = image_sizes.flip(1).tile(1, 2)[:, None].float().expand(-1, 4, -1)
        return boxes, images[:, 0, 0, :4] / 255, image_sizes.tile(1, 2)


@pytest.mark.slow
def test_the_detector_shows_a_model_of_one_channel_gray_images(picture, tmp_path):
    pytest.importorskip("onnxruntime")
    inputs = torch.zeros(1, 1, 60, 60, dtype=torch.uint8), torch.tensor([[60, 60]])
    graph = torch.export.export(Gray(), inputs)
    save(graph, tmp_path / "model.onnx", About([str(x) for x in range(61)], (60, 60), "L", 1))
    found = OnnxDetector(str(tmp_path / "model.onnx"))(Image.open(picture), threshold=0)
    expected = np.asarray(Image.open(picture).convert("L"))[0, :4] / 255
    assert [x["score"] for x in found] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_model_of_one_channel_is_compared_on_gray_images(make_dino, run, pretend, monkeypatch):
    gray = make_dino(denoising=None, max_detections=20, num_layers=1, colours=1).eval()
    options = {"classes": CLASSES, "augmentations": [], "image_format": "L"}
    monkeypatch.setattr(dino_d2, "load", lambda *_: dino_d2.Predictor(gray, **options))
    pretend(of=gray)
    assert run("--output", "model.pt2", *LOW) is None


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, b"no graph"])
def test_the_detector_needs_a_file_of_the_exporter(content, tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="model.onnx' was not written by export.py: .*ONNXRun"):
        OnnxDetector(str(path))
