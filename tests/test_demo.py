"""The program `demo.py`: images, videos, cameras and windows in, pictures and JSON out."""

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO

import dino_d2
from dino_d2.data import DatasetError, coco_writer, read_results
from dino_d2.data.coco_classes import COCO_80
from dino_d2.data.normalise import read_annotations
from dino_d2.names import plural
from dino_d2.predictor import merge_thresholds
from dino_d2.weights.checkpointer import Checkpointer
from dino_d2.weights.model_zoo import get_config

sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "dino"))
import demo  # noqa: E402
import demo_annotate  # noqa: E402
import demo_video  # noqa: E402

CLASSES = ["circle", "square", "triangle"]


def run_demo(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, words)])
    demo.main()


def complaint(monkeypatch, *words):
    """The sentence that demo.py ends with."""
    with pytest.raises(SystemExit) as end:
        run_demo(monkeypatch, *words)
    message = str(end.value)
    assert message.startswith("demo.py: ") and "\n" not in message
    return message


@pytest.fixture
def folder(image, tmp_path):
    """Two images, one of them once more in a folder inside, and something else."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "more/a.png"):
        Image.fromarray(image).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").touch()
    return tmp_path / "images"


@pytest.fixture
def detector(make_dino, monkeypatch):
    """A small detector in the place of the one that is asked for; the arguments of `load`."""
    asked = []
    predictor = dino_d2.Predictor(
        make_dino(max_detections=5).eval(),
        classes=CLASSES,
        augmentations=[T.ResizeShortestEdge(64, 1333)],
        image_format="RGB",
    )

    def load(*args):
        asked.append(args)
        predictor.thresholds = merge_thresholds({}, args[-2], CLASSES)
        return predictor

    monkeypatch.setattr(dino_d2, "load", load)
    return asked


def options(*words):
    return ("--config-file", "quickstart", "--confidence-threshold", "0", *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The quickstart's model with a checkpoint of its own, untrained."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = get_config("quickstart")
    cfg.MODEL.DEVICE, cfg.MODEL.DINO.NUM_CLASSES = "cpu", len(CLASSES)
    Checkpointer(dino_d2.DINO(cfg), str(folder), classes=CLASSES).save("model")
    return folder / "model.pth"


# ---- images


def test_folders_patterns_and_files_are_found(folder):
    found, videos, _ = demo_annotate.find_inputs(
        [f"{folder}", f"{folder}/more/*", f"{folder}/a.png"]
    )
    assert found == [folder / "a.png", folder / "b.jpg", folder / "more/a.png"]  # each once
    assert videos == []


def test_videos_are_told_from_images_by_their_names(folder):
    for name in ("c.mp4", "d.AVI"):
        (folder / name).touch()
    images, videos, _ = demo_annotate.find_inputs([str(folder)])
    assert [x.name for x in images] == ["a.png", "b.jpg"]
    assert [x.name for x in videos] == ["c.mp4", "d.AVI"]


def test_what_the_demo_has_drawn_is_taken_only_where_it_is_named(
    folder, detector, monkeypatch, capsys
):
    for _ in range(2):
        run_demo(monkeypatch, *options("--input", folder, "--output", folder))
        said = capsys.readouterr().out
        assert "10 detections in 2 images" in said
    assert ", 2 images that demo.py had drawn skipped: see" in said
    assert {x.name for x in folder.glob("*.*")} == {
        "a.png",
        "b.jpg",
        "a_1.png",
        "b.png",
        "notes.txt",
    }
    drawn = folder / "b.png"
    assert demo_annotate.find_inputs([str(drawn), f"{folder}/*.png"])[0] == [
        drawn,
        folder / "a.png",
    ]
    with pytest.raises(ValueError, match="only images that demo.py has drawn, such as"):
        demo_annotate.find_inputs([f"{folder}/b.p*"])


def test_a_damaged_picture_is_no_picture_of_the_demo(folder):
    (folder / "c.png").write_bytes(b"no image")
    assert folder / "c.png" in demo_annotate.find_inputs([str(folder)])[0]


def test_the_demo_draws_and_writes_what_it_detects(folder, trained, tmp_path, monkeypatch, capsys):
    output, file = tmp_path / "pictures", tmp_path / "detections.json"
    run_demo(
        monkeypatch,
        *("--config-file", "quickstart", "--weights", trained, "--device", "cpu"),
        *("--input", folder, folder / "more", "--output", output, "--json", file),
        *("--confidence-threshold", "0.001", "--batch-size", "2"),
    )
    assert {x.name for x in output.iterdir()} == {"a.png", "b.png", "a_1.png"}
    assert Image.open(output / "b.png").size == (630, 420)  # 7 times: at most 640
    detections = json.loads(file.read_text())
    assert {x["file_name"] for x in detections} == {str(x) for x in folder.rglob("*.[jp][pn]g")}
    assert all(x["category"] in CLASSES and x["score"] >= 0.001 for x in detections)
    # x, y, width and height
    assert all(x["bbox"][0] + x["bbox"][2] <= 90.01 for x in detections)
    assert f"{len(detections)} detections in 3 images: see" in capsys.readouterr().out


def test_what_is_asked_for_is_what_is_loaded(folder, detector, tmp_path, monkeypatch):
    words = ("--weights", "a.pth", "--device", "cpu", "--dtype", "bfloat16")
    words = (*words, "--runtime", "openvino", "--input", folder, "--json", tmp_path / "out.json")
    run_demo(monkeypatch, *options(*words), "--opts", "TEST.DETECTIONS_PER_IMAGE", "7")
    opts = ["TEST.DETECTIONS_PER_IMAGE", "7"]
    assert detector == [("quickstart", "a.pth", "cpu", opts, torch.bfloat16, {"": 0.0}, "openvino")]


def test_the_threshold_of_the_demo_is_kept(folder, detector, tmp_path, monkeypatch):
    file = tmp_path / "detections.json"
    words = options("--json", file, "--input", folder)
    run_demo(monkeypatch, *words)
    scores = [x["score"] for x in json.loads(file.read_text())]
    middle = sorted(scores)[len(scores) // 2]
    run_demo(monkeypatch, *words, "--confidence-threshold", middle)
    kept = [x["score"] for x in json.loads(file.read_text())]
    assert kept == [x for x in scores if x >= middle] and len(kept) < len(scores)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_images_that_cannot_be_read_are_left_out_and_the_rest_is_done(
    folder, detector, tmp_path, monkeypatch, capsys, batch_size
):
    (folder / "a2.png").write_text("no image")
    picture = (folder / "b.jpg").read_bytes()
    (folder / "c.jpg").write_bytes(picture[: len(picture) // 2])  # begins as one
    (folder / "d.png").touch()
    output, file = tmp_path / "pictures", tmp_path / "detections.json"
    words = ("--input", folder, "--output", output, "--json", file, "--batch-size", batch_size)
    run_demo(monkeypatch, *options(*words))
    assert {x.name for x in output.iterdir()} == {"a.png", "b.png"}
    found = {(x["image_id"], x["file_name"]) for x in json.loads(file.read_text())}
    assert found == {(1, str(folder / "a.png")), (3, str(folder / "b.jpg"))}
    out, err = capsys.readouterr()
    lines = [x for x in err.splitlines() if "left out" in x]
    assert len(lines) == 3 and "10 detections in 2 images, 3 inputs left out" in out
    for line, name in zip(lines, ("a2.png", "c.jpg", "d.png"), strict=True):
        assert line.startswith(f"image '{folder / name}' cannot be read (")


def test_an_image_of_a_size_that_cannot_be_is_left_out(folder, detector, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    words = options("--input", folder / "a.png", "--json", folder / "out.json")
    complaint(monkeypatch, *words)
    assert "a.png' cannot be read (" in capsys.readouterr().err


def test_a_run_in_which_nothing_can_be_read_fails(folder, detector, tmp_path, monkeypatch):
    (folder / "a2.png").write_text("no image")
    file = tmp_path / "detections.json"
    words = options("--input", folder / "a2.png", "--json", file)
    assert "no input could be read" in complaint(monkeypatch, *words)
    assert not file.exists()


@pytest.fixture
def annotator(make_dino, tmp_path):
    predictor = dino_d2.Predictor(
        make_dino(max_detections=5).eval(), classes=CLASSES, augmentations=[], image_format="RGB"
    )
    return demo_annotate.Annotator(
        predictor, output=tmp_path, batch_size=1, categories=None, taken=[]
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x/a.jpg", "b.png", "y/a.png", "z/a.bmp"], ["a", "b", "a_1", "a_2"]),
        (["a.png", "a_1.png", "b/a.png"], ["a", "a_1", "a_2"]),
        (["a.png", "b/a.png", "a_1.png"], ["a", "a_1", "a_1_1"]),
    ],
)
def test_no_picture_of_a_run_replaces_another(names, expected, annotator, tmp_path):
    found = [annotator.free_path(name, ".png") for name in names]
    assert found == [tmp_path / f"{name}.png" for name in expected]


@pytest.mark.parametrize("place", ["images", "images/../images", "link"])
def test_pictures_never_replace_the_inputs(place, folder, detector, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    run_demo(monkeypatch, *options("--input", folder, "--output", tmp_path / place))
    assert {path: path.read_bytes() for path in before} == before
    added = {path.name for path in folder.glob("*.*")} - {path.name for path in before}
    assert added == {"a_1.png", "b.png"}


def test_a_folder_with_the_name_of_a_picture_is_passed_by(folder, detector, tmp_path, monkeypatch):
    output, file = tmp_path / "out", tmp_path / "out.json"
    (output / "a.png").mkdir(parents=True)
    run_demo(monkeypatch, *options("--input", folder, "--output", output, "--json", file))
    assert {path.name for path in output.glob("*") if path.is_file()} == {"a_1.png", "b.png"}
    assert len(json.loads(file.read_text())) == 10


def test_detections_are_enlarged_with_the_image():
    found = Instances((2, 3), pred_boxes=Boxes(torch.tensor([[0.0, 1, 2, 2]])))
    found.pred_masks = torch.tensor([[[False, False, True], [True, True, False]]])
    larger = demo_annotate.enlarge_boxes(found, 2)
    assert larger.image_size == (4, 6) and larger.pred_boxes.tensor.tolist() == [[0, 2, 4, 4]]
    rows = [[0, 0, 0, 0, 1, 1]] * 2 + [[1, 1, 1, 1, 0, 0]] * 2
    assert larger.pred_masks[0].int().tolist() == rows
    assert found.pred_boxes.tensor.tolist() == [[0, 1, 2, 2]] and found.pred_masks.shape[1] == 2


@pytest.fixture
def segmenter(make_mask_dino, randomise, monkeypatch):
    """A small panoptic model in the place of the detector that is asked for."""
    model = make_mask_dino().eval()
    randomise(model.decoder.mask_head)
    model.panoptic_on, model.object_mask_threshold, model.overlap_threshold = True, 0.0, 0.0
    options = {"augmentations": [], "image_format": "RGB"}
    predictor = dino_d2.Predictor(model, classes=CLASSES, **options)
    monkeypatch.setattr(dino_d2, "load", lambda *_: predictor)
    return predictor


@pytest.mark.parametrize("kind", ["panoptic", "semantic"])
def test_segments_are_drawn_and_counted(kind, folder, segmenter, tmp_path, monkeypatch, capsys):
    output, file = tmp_path / "pictures", tmp_path / "detections.json"
    words = ("--config-file", "quickstart_masks", "--input", folder / "a.png", "--output", output)
    if kind == "panoptic":
        words += ("--json", file)
    else:
        model = segmenter.model
        model.instance_on, model.panoptic_on, model.semantic_on = False, False, True
        said = complaint(monkeypatch, *words, "--json", file)
        assert "--json is about detections, and this model gives segments alone" in said
    drawn, draw = [], demo_annotate.draw_segments
    monkeypatch.setattr(
        demo_annotate, "draw_segments", lambda *args: drawn.append(args) or draw(*args)
    )
    run_demo(monkeypatch, *words)
    ((image, ids, segments, classes),) = drawn
    result = segmenter.results(folder / "a.png")
    if kind == "panoptic":
        expected, _ = result["panoptic_seg"]
        assert len(result["instances"]) == len(json.loads(file.read_text()))
    else:
        expected = result["sem_seg"].argmax(0) + 1
    assert torch.equal(ids[::7, ::7], expected) and ids.shape == (420, 630)
    assert image.size == (630, 420) and classes == CLASSES
    assert {x["id"] for x in segments} == {*expected.unique().tolist()} - {0} != set()
    assert f"{plural(len(segments), 'segment')} in 1 image" in capsys.readouterr().out
    assert Image.open(output / "a.png").size == (630, 420)


def test_results_are_counted_and_only_kept_where_they_are_wanted(annotator, folder):
    assert annotator.run_images([folder / "a.png"], [1])
    assert annotator.found > 0 and annotator.results == []
    assert annotator.summary() == f"{annotator.found} detections in 1 image"


def test_where_nothing_is_found_the_highest_score_is_said(annotator, folder):
    annotator.predictor.thresholds = dict.fromkeys(annotator.predictor.classes, 1.0)
    assert annotator.run_images([folder / "a.png"], [1])
    score = f"{annotator.predictor.highest:.2f}"
    said = f"0 detections in 1 image, as no score is above {score}: lower --confidence-threshold"
    assert annotator.summary() == said and score != "0.00"


def test_an_interrupted_run_says_what_was_done(folder, detector, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_annotate, "to_results", interrupted)
    output, file = tmp_path / "pictures", tmp_path / "out.json"
    file.write_text("before")
    words = options("--input", folder, "--json", file)
    done = "demo.py: interrupted after 0 detections in 0 images"
    lacks = f"; '{file}' is not written"
    assert complaint(monkeypatch, *words) == done + lacks
    assert complaint(monkeypatch, *words, "--output", output) == f"{done}: see '{output}'{lacks}"
    assert file.read_text() == "before"


def test_an_interrupted_run_without_a_json_says_nothing_of_one(
    folder, detector, tmp_path, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_annotate, "draw_instances", interrupted)
    message = complaint(monkeypatch, *options("--input", folder, "--output", tmp_path / "out"))
    assert message.endswith(f"in 1 image: see '{tmp_path / 'out'}'")


# ---- the JSON


@pytest.fixture
def annotations(folder):
    """Of the images in the folder, under their own ids and names."""
    dataset = {
        "images": [
            {"id": 70, "file_name": "a.png", "width": 90, "height": 60},
            {"id": 71, "file_name": "more/a.png", "width": 90, "height": 60},
            {"id": 72, "file_name": "images/b.jpg", "width": 90, "height": 60},
        ],
        "annotations": [],
        "categories": [{"id": 9 - i, "name": name} for i, name in enumerate(CLASSES)],
    }
    (folder.parent / "ground_truth.json").write_text(json.dumps(dataset))
    return folder.parent / "ground_truth.json"


def test_the_json_has_the_ids_of_the_annotations_and_is_read_by_pycocotools(
    folder, annotations, detector, tmp_path, monkeypatch
):
    file = tmp_path / "out.json"
    words = ("--input", folder, folder / "more", "--json", file, "--annotations", annotations)
    run_demo(monkeypatch, *options(*words))
    found = json.loads(file.read_text())
    names = {x["image_id"]: x["file_name"] for x in found}
    assert names == {
        70: f"{folder}/a.png",
        71: f"{folder}/more/a.png",
        72: f"{folder}/b.jpg",
    }
    assert all(x["category_id"] == 9 - CLASSES.index(x["category"]) for x in found)
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = COCO(str(annotations)).loadRes(str(file))
    assert len(loaded.anns) == len(found) == 15
    assert read_results(file, json.loads(annotations.read_text())) == found


def test_without_annotations_images_and_classes_are_counted(
    folder, detector, tmp_path, monkeypatch
):
    file = tmp_path / "out.json"
    run_demo(monkeypatch, *options("--input", folder, "--json", file))
    found = json.loads(file.read_text())
    assert {x["image_id"] for x in found} == {1, 2}
    assert all(x["category_id"] == CLASSES.index(x["category"]) + 1 for x in found)


def test_classes_of_coco_have_its_ids():
    ids = coco_writer.category_ids(COCO_80, None)
    assert ids[0] == 1 and ids[-1] == 90 and len(set(ids)) == 80


def test_the_annotations_are_not_replaced_by_the_detections(folder, annotations, monkeypatch):
    before = annotations.read_bytes()
    monkeypatch.chdir(annotations.parent)
    words = ("--input", folder, "--json", annotations, "--annotations", annotations.name)
    assert "would replace an input" in complaint(monkeypatch, *options(*words))
    assert annotations.read_bytes() == before


def test_an_image_that_is_not_annotated_is_one_sentence(folder, annotations, monkeypatch):
    (folder / "b.jpg").rename(folder / "bb.jpg")
    words = ("--input", folder, "--json", folder / "out.json", "--annotations", annotations)
    message = complaint(monkeypatch, *options(*words))
    assert f"'{folder / 'bb.jpg'}' is not in the annotations" in message


def test_two_inputs_that_are_one_image_of_the_annotations_are_refused(annotations):
    dataset = read_annotations(annotations)
    first, second = Path("x/a.png"), Path("y/a.png")
    with pytest.raises(ValueError, match=f"'{first}' and '{second}' would both be 'a.png'"):
        coco_writer.image_ids([first, second], dataset)
    assert coco_writer.image_ids([first, Path("more/a.png")], dataset) == [70, 71]


def test_an_image_may_differ_from_its_annotated_name_in_case(annotations):
    dataset = read_annotations(annotations)
    assert coco_writer.image_ids([Path("x/A.PNG")], dataset) == [70]


@pytest.mark.parametrize(
    ("key", "fault"),
    [("images", "has file_name None"), ("categories", "has name None")],
)
def test_annotations_without_a_name_are_one_sentence(key, fault, folder, annotations, monkeypatch):
    dataset = json.loads(annotations.read_text())
    del dataset[key][1]["file_name" if key == "images" else "name"]
    annotations.write_text(json.dumps(dataset))
    words = ("--input", folder, "--json", folder / "out.json", "--annotations", annotations)
    assert f"'{annotations}': entry 1 of '{key}' {fault}" in complaint(
        monkeypatch, *options(*words)
    )


@pytest.mark.parametrize("key", ["images", "categories"])
def test_an_entry_of_the_annotations_that_is_a_number_is_one_sentence(key, annotations):
    dataset = json.loads(annotations.read_text())
    dataset[key][1] = 5
    annotations.write_text(json.dumps(dataset))
    with pytest.raises(DatasetError, match=f"'{annotations}': entry 1 of '{key}'"):
        read_annotations(annotations)


def test_the_folder_of_the_json_is_made_as_that_of_the_pictures(
    folder, detector, tmp_path, monkeypatch
):
    file = tmp_path / "new" / "folder" / "out.json"
    run_demo(monkeypatch, *options("--input", folder, "--json", file))
    assert len(json.loads(file.read_text())) == 10


def test_a_class_that_is_not_annotated_is_one_sentence(annotations):
    with pytest.raises(ValueError, match="class 'squares' is not in the .*mean: square"):
        dataset = read_annotations(annotations)
        coco_writer.category_ids(["circle", "squares"], dataset)


# ---- videos


@pytest.fixture
def write_video(tmp_path):
    """Frame i is of the grey value 10 * i (of 250 at most)."""
    cv2 = pytest.importorskip("cv2")

    def write(name="a.mp4", frames=5, rate=12.5, codec="mp4v"):
        path = tmp_path / name
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, (96, 64))
        for i in range(frames):
            writer.write(np.full((64, 96, 3), min(10 * i, 250), np.uint8))
        writer.release()
        return path

    return write


def test_a_video_comes_out_annotated_with_the_rate_the_size_and_the_frames_it_had(
    write_video, detector, tmp_path, monkeypatch, capsys
):
    words = ("--input", write_video(), "--output", tmp_path / "out", "--batch-size", "2")
    run_demo(monkeypatch, *options(*words))
    drawn = demo_video.Video(tmp_path / "out" / "a.mp4")
    assert (drawn.rate, drawn.size, drawn.length) == (12.5, (96, 64), 5)
    assert len(list(drawn)) == 5
    assert "25 detections in 5 frames of 1 video: see" in capsys.readouterr().out


def test_a_video_that_the_demo_has_annotated_is_passed_over(
    write_video, detector, tmp_path, monkeypatch
):
    write_video()
    run_demo(monkeypatch, *options("--input", tmp_path, "--output", tmp_path))
    drawn = tmp_path / "a_1.mp4"
    assert len(list(demo_video.Video(drawn))) == 5  # whatever is at its end
    assert demo_annotate.find_inputs([str(tmp_path)]) == ([], [tmp_path / "a.mp4"], 1)
    assert demo_annotate.find_inputs([str(drawn)]) == ([], [drawn], 0)


def test_a_video_never_replaces_its_input(write_video, detector, tmp_path, monkeypatch):
    path = write_video()
    before = path.read_bytes()
    run_demo(monkeypatch, *options("--input", path, "--output", tmp_path))
    assert path.read_bytes() == before
    assert demo_video.Video(tmp_path / "a_1.mp4").length == 5


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_is_given_back_when_its_video_ends(fails, write_video):
    with contextlib.suppress(KeyboardInterrupt), demo_video.Video(write_video()) as video:
        assert len(list(video)) == 5
        if fails:
            raise KeyboardInterrupt
    assert not video.capture.isOpened()


def test_the_videos_of_a_run_are_given_back(write_video, detector, tmp_path, monkeypatch):
    opened = []

    class Watched(demo_video.Video):
        def __init__(self, source):
            super().__init__(source)
            opened.append(self)

    monkeypatch.setattr(demo_annotate, "Video", Watched)
    run_demo(monkeypatch, *options("--input", write_video(), "--json", tmp_path / "out.json"))
    assert [x.capture.isOpened() for x in opened] == [False]


def test_frames_are_read_in_order_and_as_rgb(write_video, monkeypatch):
    frames = list(demo_video.Video(write_video()))
    assert [round(x.mean() / 10) for x in frames] == [0, 1, 2, 3, 4]
    opened = demo_video.Video(write_video())
    opened.first = np.stack([np.full((64, 96), x, np.uint8) for x in (1, 2, 3)], -1)
    assert next(iter(opened))[0, 0].tolist() == [3, 2, 1]


def test_a_written_frame_has_the_colours_of_the_picture(tmp_path, write_video):
    with demo_video.VideoWriter(tmp_path / "red.mp4", 10, (96, 64)) as writer:
        writer.write(Image.new("RGB", (96, 64), (200, 0, 0)))
    red, green, blue = next(iter(demo_video.Video(tmp_path / "red.mp4")))[32, 48].tolist()
    assert red > 150 and green < 50 and blue < 50


def test_the_json_tells_images_and_frames_apart(
    folder, write_video, detector, tmp_path, monkeypatch
):
    first, second, file = write_video(frames=2), write_video("b.mp4", 3), tmp_path / "out.json"
    run_demo(monkeypatch, *options("--input", first, second, folder, "--json", file))
    found = [(x["image_id"], x["file_name"], x.get("frame")) for x in json.loads(file.read_text())]
    assert list(dict.fromkeys(found)) == [
        (1, f"{folder}/a.png", None),
        (2, f"{folder}/b.jpg", None),
        *((3 + i, str(first), i) for i in range(2)),
        *((5 + i, str(second), i) for i in range(3)),
    ]


def test_videos_that_cannot_be_read_are_left_out(
    write_video, detector, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    words = ("--input", tmp_path / "empty.mp4", tmp_path / "text.mp4", "--json", tmp_path / "x")
    assert "nothing was done" in complaint(monkeypatch, *options(*words))
    capsys.readouterr()
    run_demo(monkeypatch, *options(*words, "--input", tmp_path / "empty.mp4", write_video()))
    out, err = capsys.readouterr()
    assert "5 frames of 1 video, 1 input left out" in out
    assert f"'{tmp_path}/empty.mp4' cannot be read: it is empty, damaged" in err


def test_a_video_that_ends_too_early_is_said_to(
    write_video, detector, tmp_path, monkeypatch, capsys
):
    path = write_video("a.avi", 60, codec="MJPG")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    run_demo(monkeypatch, *options("--input", path, "--json", tmp_path / "out.json"))
    out, err = capsys.readouterr()
    done = int(out.split(" frames")[0].split()[-1])
    assert 0 < done < 60 and f"lacks {60 - done} of 60 frames" in err


def test_a_video_that_cannot_be_written_is_left_out(
    write_video, detector, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(demo_video, "CODEC", "none")
    words = ("--input", write_video(), "--output", tmp_path / "out", "--json", tmp_path / "x")
    assert "nothing was done" in complaint(monkeypatch, *options(*words))
    assert "a.mp4' cannot be written: this OpenCV has no codec" in capsys.readouterr().err


def test_annotations_of_videos_are_refused(write_video, annotations, tmp_path, monkeypatch):
    words = ("--input", write_video(), "--json", tmp_path / "x", "--annotations", annotations)
    assert "leave out videos" in complaint(monkeypatch, *options(*words))


def test_a_missing_opencv_is_one_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (folder / "a.mp4").touch()
    message = complaint(monkeypatch, *options("--input", folder, "--json", tmp_path / "x"))
    assert message.endswith("need OpenCV: pip install opencv-python")


# ---- cameras and windows


@pytest.fixture
def camera(write_video, monkeypatch):
    """Camera 1 is a video of five frames; what it does after them."""
    opencv, path, after = demo_video.opencv(), write_video(), []

    class Capture:
        def __init__(self, source):
            self.file = opencv.VideoCapture(str(path if source == 1 else "nowhere"))

        def get(self, key):
            return 0.0  # as cameras do

        def read(self):
            there, frame = self.file.read()
            if not there and after:
                raise after[0]
            return there, frame

        def release(self):
            self.file.release()

    proxy = SimpleNamespace(**{name: getattr(opencv, name) for name in dir(opencv)})
    proxy.VideoCapture = Capture
    monkeypatch.setattr(demo_video, "opencv", lambda: proxy)
    return after


def test_ctrl_c_ends_a_camera_and_what_was_seen_is_complete(
    camera, detector, tmp_path, monkeypatch, capsys
):
    camera.append(KeyboardInterrupt())
    words = ("--webcam", "1", "--output", tmp_path / "out", "--json", tmp_path / "out.json")
    run_demo(monkeypatch, *options(*words))
    assert "25 detections in 5 frames of 1 video" in capsys.readouterr().out
    frames = {x["frame"] for x in json.loads((tmp_path / "out.json").read_text())}
    assert frames == set(range(5))
    cv2 = pytest.importorskip("cv2")
    file = cv2.VideoCapture(str(tmp_path / "out" / "camera_1.mp4"))
    assert file.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert file.get(cv2.CAP_PROP_FPS) == demo_video.USUAL_RATE


def test_a_camera_that_is_not_there_is_one_sentence(camera, tmp_path, monkeypatch):
    message = complaint(monkeypatch, *options("--webcam", "--json", tmp_path / "x"))
    assert "camera 0 cannot be read" in message


@pytest.fixture
def screen(monkeypatch):
    """An OpenCV whose windows take the keys of a list, and keep what is shown."""
    cv2 = pytest.importorskip("cv2")
    shown, keys = [], []
    proxy = SimpleNamespace(**{name: getattr(cv2, name) for name in dir(cv2)})
    proxy.namedWindow = lambda *_: None
    proxy.imshow = lambda title, picture: shown.append(picture)
    proxy.waitKey = lambda wait: keys.pop(0) if keys else -1
    proxy.getWindowProperty = lambda *_: 1.0
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(demo_video, "opencv", lambda: proxy)
    return SimpleNamespace(shown=shown, keys=keys, cv2=proxy)


def test_images_are_shown_until_a_key_and_q_ends(folder, detector, screen, monkeypatch, capsys):
    screen.keys[:] = [-1, -1, ord(" "), ord("q")]
    run_demo(monkeypatch, *options("--input", folder, folder / "more", "--show"))
    assert [x.shape for x in screen.shown] == [(420, 630, 3)] * 2 and screen.keys == []
    assert capsys.readouterr().out.strip().endswith("10 detections in 2 images")


def test_frames_are_shown_one_after_the_other_until_q(
    write_video, detector, screen, monkeypatch, capsys
):
    screen.keys[:] = [-1, -1, ord("q")]
    run_demo(monkeypatch, *options("--input", write_video(), write_video("b.mp4"), "--show"))
    assert len(screen.shown) == 3 and "in 3 frames of 1 video" in capsys.readouterr().out


def test_a_window_that_is_closed_ends_the_program(folder, detector, screen, monkeypatch):
    screen.cv2.getWindowProperty = lambda *_: 0.0
    run_demo(monkeypatch, *options("--input", folder, "--show"))
    assert len(screen.shown) == 1


def test_a_window_shows_blue_green_red_as_opencv_wants_it(screen):
    screen.keys[:] = [0]
    demo_video.Window().show(Image.new("RGB", (4, 4), (10, 20, 30)), stay=True)
    assert screen.shown[0][0, 0].tolist() == [30, 20, 10]


def test_without_a_display_one_sentence_says_what_to_do(folder, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    message = complaint(monkeypatch, *options("--input", folder, "--show"))
    assert "no display" in message and "use --output FOLDER" in message


def test_an_opencv_without_windows_is_one_sentence(folder, screen, monkeypatch):
    def fail(*_):
        raise screen.cv2.error("not implemented")

    screen.cv2.namedWindow = fail
    message = complaint(monkeypatch, *options("--input", folder, "--show"))
    assert "has no windows" in message and "use --output FOLDER" in message


# ---- what cannot be


@pytest.fixture
def no_work(monkeypatch):
    def fail(*_):
        raise AssertionError("an image was looked at")

    monkeypatch.setattr(demo, "run", fail)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "nowhere/*.jpg"], "--input 'nowhere/*.jpg' is not a file"),
        (["--input", "{tmp}/imags"], "did you mean: '{tmp}/images'"),
        (["--input", "{tmp}/images/aa.png"], "did you mean: '{tmp}/images/a.png'"),
        (["--input", "{tmp}/empty"], "--input '{tmp}/empty' is not a file, nor a folder"),
        (["--config-file", "quickstrt"], "did you mean: quickstart"),
        (["--weights", "nowhere.pth"], "'nowhere.pth' is not a file"),
        (["--weights", "{tmp}/images/notes.txt"], "notes.txt' is damaged or not a checkpoint"),
        (["--output", "{tmp}/file"], "--output '{tmp}/file' is not writable (it is"),
        (["--output", "{tmp}/file/more"], "(Not a directory)"),
        (["--json", "{tmp}/file/out.json"], "the folder of --json '{tmp}/file' is not writable"),
        (["--json", "{tmp}/empty"], "--json '{tmp}/empty' is a folder"),
        (["--json", "{tmp}/images/a.png"], "would replace an input"),
        (["--json", "{tmp}/empty/../images/b.jpg"], "would replace an input"),
        (["--json", "{weights}"], "would replace an input"),
        (["--annotations", "{tmp}/none.json"], "'{tmp}/none.json' does not exist"),
        (["--annotations", "{tmp}/image"], "does not exist; did you mean: '{tmp}/images'"),
        (["--device", "cud"], "did you mean: cuda, cpu"),
        (["--device", "cuda"], "no GPU"),
        (["--device", "mps"], "no MPS"),
        (["--opts", "MODEL.DINO.NUM_CLASS", "1"], "did you mean: MODEL.DINO.NUM_CLASSES"),
        (["--opts", "TEST.DETECTIONS_PER_IMAGE"], "has no value"),
    ],
)
def test_what_the_demo_cannot_do_is_one_sentence_before_it_begins(
    words, message, folder, trained, tmp_path, monkeypatch, no_work
):
    for backend in (torch.cuda, torch.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    usual = ("--config-file", "quickstart", "--weights", trained, "--device", "cpu")
    usual = (*usual, "--input", folder, "--json", tmp_path / "out.json")
    words = [word.format(tmp=tmp_path, weights=trained) for word in words]
    assert message.format(tmp=tmp_path) in complaint(monkeypatch, *usual, *words)


NO_CONFIGS = {
    "text.yaml": (b"hello", "has no keys"),
    "list.yaml": (b"- 1\n- 2\n", "has no keys"),
    "other.yaml": (b"MODEL: {DINOS: 1}", "other.yaml': there is no key 'MODEL.DINOS'"),
    "broken.yaml": (b"MODEL: [", "broken.yaml' is not YAML"),
    "target.yaml": (b"a: {_target_: builtins.dict}", "dataloader"),
    "bytes.yaml": (b"\xff\xfe\x00\x01", "bytes.yaml' is a binary file, not a config"),
    "empty.py": (b"", "dataloader"),
    "broken.py": (b"model = (", "broken.py has syntax error"),
    "name.py": (b"model = nowhere", "nowhere"),
    "import.py": (b"import nowhere_at_all", "nowhere_at_all"),
    "detector.yaml": (
        b"MODEL: {META_ARCHITECTURE: ProposalNetwork, WEIGHTS: a.pth}",
        "that of a ProposalNetwork",
    ),
}


@pytest.mark.parametrize("name", NO_CONFIGS)
def test_a_config_that_is_none_is_one_sentence(
    name, folder, trained, tmp_path, monkeypatch, no_work
):
    content, message = NO_CONFIGS[name]
    (tmp_path / name).write_bytes(content)
    words = ("--weights", trained, "--device", "cpu", "--input", folder)
    words = ("--config-file", tmp_path / name, *words, "--json", tmp_path / "out")
    assert message in complaint(monkeypatch, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "x.png"], "--output FOLDER, --json FILE or --show"),
        (["--json", "out.json"], "--input FILES, --data FOLDER or --webcam"),
        (["--input", "x.png", "--show", "--annotations", "a.json"], "--json FILE"),
        (["--input", "x.png", "--show", "--batch-size", "0"], "1 or more"),
        (["--input", "x.png", "--show", "--confidence-threshold", "50"], "number between 0 and 1"),
    ],
)
def test_the_demo_refuses_options_that_say_nothing(words, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_demo(monkeypatch, "--config-file", "quickstart", *words)
    assert message in capsys.readouterr().err
