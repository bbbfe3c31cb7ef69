"""Small objects in large images, and objects that move: `demo.py --tiles` and `--track`."""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from scipy.ndimage import find_objects, label

import dino_d2
from dino_d2.tiles import detect_in_tiles

sys.path.insert(0, str(Path(__file__).parents[1] / "projects" / "dino"))
import demo  # noqa: E402
import demo_track  # noqa: E402

PAGE = Path(__file__).parents[1] / "projects" / "dino" / "DETECTING.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
CLASSES = ["red", "green", "blue"]
SIDE = 12  # of the objects, in pixels


class Finder:
    """A predictor of objects of a pure colour; the score is the share of an object that it sees."""

    def __init__(self, masks=False):
        self.classes, self.thresholds, self.highest = CLASSES, dict.fromkeys(CLASSES, 0.3), 1.0
        self.masks, self.seen, self.gives_instances = masks, [], True

    def __call__(self, images, threshold=None):
        if isinstance(images, list):
            return [self(x, threshold) for x in images]
        if isinstance(images, str):
            images = np.asarray(Image.open(images))
        self.seen.append(images.shape)
        rows = []
        for c in range(3):
            parts, _ = label(images[:, :, c] > 128)
            for i, (y, x) in enumerate(find_objects(parts), start=1):
                box, mask = (x.start, y.start, x.stop, y.stop), parts == i
                rows.append((min(1.0, mask.sum() / SIDE**2), c, box, mask))
        rows = [x for x in rows if x[0] >= (0.3 if threshold is None else threshold)]
        rows.sort(key=lambda x: -x[0])
        found = Instances(
            images.shape[:2],
            pred_boxes=Boxes(torch.tensor([x[2] for x in rows]).reshape(-1, 4).float()),
            scores=torch.tensor([x[0] for x in rows]),
            pred_classes=torch.tensor([x[1] for x in rows], dtype=torch.int64),
        )
        if self.masks:
            masks = np.array([x[3] for x in rows], dtype=bool)
            found.pred_masks = torch.from_numpy(masks.reshape(-1, *images.shape[:2]))
        return found


def paint(size, objects):
    """A dark picture (H, W, 3) with objects (class, left, top)."""
    picture = np.full((*size, 3), 20, np.uint8)
    for c, x, y in objects:
        picture[y : y + SIDE, x : x + SIDE, c] = 255
    return picture


def objects_of(found):
    """(class, left, top) of detections, which have to be of the objects' size."""
    boxes = found.pred_boxes.tensor.round().int()
    assert (boxes[:, 2:] - boxes[:, :2] == SIDE).all()
    labels = found.pred_classes.tolist()
    return [(c, *box[:2]) for c, box in zip(labels, boxes.tolist(), strict=True)]


# ---- tiles


@pytest.fixture
def supervision():
    return pytest.importorskip("supervision", reason="supervision, which cuts tiles, is missing")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_object_on_the_border_of_tiles_is_found_once_and_whole(supervision, batch_size):
    """Tiles of 100 begin at 0, 80, 160 and 200: they end at 100, 180, 260 and 300."""
    objects = [(0, 94, 10), (1, 74, 50), (2, 94, 94), (0, 174, 74), (1, 255, 175), (2, 288, 188)]
    finder = Finder()
    found = detect_in_tiles(finder, paint((200, 300), objects), 100, batch_size=batch_size)
    assert sorted(objects_of(found)) == sorted(objects)
    assert set(finder.seen) == {(100, 100, 3)} and found.image_size == (200, 300)


def test_each_of_a_thousand_small_objects_in_a_large_image_is_found_once(supervision):
    rng = np.random.default_rng(0)
    cells = rng.permutation(50 * 40)[:1000]
    objects = [
        (int(rng.integers(3)), int(x * 40 + rng.integers(27)), int(y * 40 + rng.integers(27)))
        for y, x in zip(*divmod(cells, 50), strict=True)
    ]
    found = detect_in_tiles(Finder(), paint((1600, 2000), objects), 256)
    assert sorted(objects_of(found)) == sorted(objects)


def test_objects_of_other_classes_at_one_place_are_kept(supervision):
    objects = [(0, 50, 50), (1, 50, 50), (2, 90, 50)]
    found = detect_in_tiles(Finder(), paint((100, 180), objects), 100)
    assert sorted(objects_of(found)) == objects


def test_scores_are_in_descending_order_and_of_the_threshold(supervision):
    picture = paint((100, 180), [(0, 10, 10), (1, 80, 40), (0, 150, 80)])
    picture[16:22], picture[49:52] = 20, 20  # half of the first, three quarters of the second
    finder = Finder()
    found = detect_in_tiles(finder, picture, 100)
    assert found.scores.tolist() == pytest.approx([1.0, 0.75, 0.5])
    assert len(detect_in_tiles(finder, picture, 100, threshold=0.6)) == 2
    assert len(detect_in_tiles(finder, picture, 100, threshold=1.0)) == 1


def test_masks_are_those_of_the_whole_image(supervision):
    objects = [(0, 94, 10), (1, 74, 50), (0, 150, 80)]
    picture = paint((100, 180), objects)
    found = detect_in_tiles(Finder(masks=True), picture, 100)
    assert sorted(objects_of(found)) == sorted(objects)
    for mask, c, box in zip(found.pred_masks, found.pred_classes, found.pred_boxes, strict=True):
        x, y = box[:2].int().tolist()
        assert mask.numpy().sum() == SIDE**2 and mask[y : y + SIDE, x : x + SIDE].all()
        assert (picture[mask.numpy()][:, c] == 255).all()


def test_many_tiles_are_said(supervision, caplog):
    image = np.zeros((200, 400, 3), np.uint8)
    detect_in_tiles(Finder(), image, size=100, overlap=0)
    assert not caplog.records
    detect_in_tiles(Finder(), image, size=10, overlap=0.2)
    assert "An image of 400 x 200 pixels has 1,250 tiles of 10 pixels" in caplog.text


def test_where_nothing_is_there_nothing_is_found(supervision):
    found = detect_in_tiles(Finder(), paint((5, 7), []), 100)
    assert len(found) == 0 and found.pred_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "size is 0; it has to be a whole number from 1 on"),
        ({"size": 9, "overlap": 1.5}, "overlap is 1.5; it has to be a number from 0 to 1"),
        ({"size": 9, "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_tiles_that_cannot_be_are_one_sentence(values, message):
    with pytest.raises(ValueError, match=message):
        detect_in_tiles(Finder(), paint((9, 9), []), **values)


# ---- tracks


@pytest.fixture
def trackers():
    return pytest.importorskip("trackers", reason="trackers, which has ByteTrack, is missing")


def frame(*objects):
    """Detections (class, left, score) of squares at one height."""
    left = torch.tensor([x[1] for x in objects]).float()[:, None]
    return Instances(
        (100, 300),
        pred_boxes=Boxes(torch.cat([left, left * 0, left + SIDE, left * 0 + SIDE], 1)),
        scores=torch.tensor([x[2] for x in objects]).float(),
        pred_classes=torch.tensor([x[0] for x in objects]).long(),
    )


def ids(tracker, *objects):
    found = tracker(frame(*objects))
    return dict(zip(found.pred_classes.tolist(), found.track_ids.tolist(), strict=True))


def test_an_object_gets_an_id_in_its_second_frame_and_keeps_it(trackers):
    tracker = demo_track.Tracker(Finder(), 25)
    assert ids(tracker, (0, 10, 0.9), (1, 200, 0.8)) == {0: -1, 1: -1}
    first = ids(tracker, (0, 12, 0.9), (1, 197, 0.8))
    assert sorted(first.values()) == [0, 1]
    assert ids(tracker, (1, 194, 0.9), (0, 14, 0.8)) == first
    assert ids(tracker, (1, 191, 0.9), (0, 16, 0.8), (2, 100, 0.7)) == {**first, 2: -1}
    assert ids(tracker) == {}  # a frame in which nothing is found
    assert ids(tracker, (1, 185, 0.9), (0, 20, 0.8)) == first


def test_a_score_below_the_threshold_continues_a_track_and_begins_none(trackers):
    tracker = demo_track.Tracker(Finder(), 25)
    assert tracker.lowest == 0.1
    ids(tracker, (0, 10, 0.9), (1, 200, 0.2))
    assert ids(tracker, (0, 12, 0.9), (1, 200, 0.2)) == {0: 0}
    assert ids(tracker, (1, 200, 0.2), (0, 14, 0.15)) == {0: 0}


def test_the_better_of_two_classes_at_one_place_is_tracked(trackers):
    tracker = demo_track.Tracker(Finder(), 25)
    for scores in ((0.9, 0.8), (0.8, 0.7)):
        found = ids(tracker, (0, 10, scores[0]), (1, 11, scores[1]))
    assert found == {0: 0}


def run_demo(monkeypatch, *words):
    monkeypatch.setattr(dino_d2, "load", lambda *_: Finder())
    monkeypatch.setattr(sys, "argv", ["demo.py", "--weights", "a", *map(str, words)])
    demo.main()


def test_the_objects_of_a_video_keep_their_ids_in_the_json(trackers, tmp_path, monkeypatch):
    """Two red ones pass a green one; each video counts from 0."""
    cv2 = pytest.importorskip("cv2")
    for name in ("a.mp4", "b.mp4"):
        code = cv2.VideoWriter_fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(tmp_path / name), code, 12.5, (192, 96))
        for i in range(20):
            moving = (0, 20 + 4 * i, 20), (0, 150 - 4 * i, 70), (1, 90, 44)
            writer.write(paint((96, 192), moving)[:, :, ::-1].copy())
        writer.release()
    words = ("--input", tmp_path, "--json", tmp_path / "out.json", "--output", tmp_path / "out")
    run_demo(monkeypatch, *words, "--track", "--batch-size", "3")
    places = defaultdict(dict)
    for x in json.loads((tmp_path / "out.json").read_text()):
        assert ("track_id" in x) == (x["frame"] > 0)
        if x["frame"]:
            places[x["file_name"], x["category"], x["track_id"]][x["frame"]] = x["bbox"]
    found = {key[:2] for key in places}
    assert len(places) == 6 and len(found) == 4  # red and green in two videos
    assert {key[2] for key in places} == {0, 1, 2}
    for (_, colour, _), boxes in places.items():
        moves = np.diff([boxes[i][0] for i in range(1, 20)])
        assert (abs(abs(moves) - (4 if colour == "red" else 0)) < 2).all()


def test_the_demo_detects_in_tiles(supervision, tmp_path, monkeypatch, capsys):
    objects = [(0, 94, 10), (1, 74, 50), (2, 94, 94)]
    Image.fromarray(paint((200, 300), objects)).save(tmp_path / "a.png")
    words = ("--input", tmp_path / "a.png", "--json", tmp_path / "out.json")
    run_demo(monkeypatch, *words, "--tiles", "100", "--output", tmp_path / "out")
    boxes = [x["bbox"] for x in json.loads((tmp_path / "out.json").read_text())]
    assert sorted(boxes) == sorted([x, y, SIDE, SIDE] for _, x, y in objects)
    assert "3 detections in 1 image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "missing", "message"),
    [
        (["--tiles", "0"], None, "--tiles has to be 1 or more"),
        (["--track"], None, "--track is for videos and cameras, and there are none"),
        (["--tiles", "9"], "supervision", "tiles need supervision: pip install supervision"),
        (["--track", "--webcam"], "trackers", "tracks need trackers: pip install trackers"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, missing, message, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(demo, "Video", lambda _: None)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as end:
        run_demo(monkeypatch, "--input", tmp_path / "a.png", "--json", tmp_path / "x", *words)
    assert message in f"{end.value}{capsys.readouterr().err}"


# ---- the page


@pytest.fixture
def run_snippet(tmp_path, monkeypatch):
    """Runs the snippet of the page that imports a package, on a photo of three objects."""
    Image.fromarray(paint((200, 300), [(0, 30, 10), (1, 74, 50), (2, 94, 94)])).save(
        tmp_path / "photo.jpg", quality=100, subsampling=0
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dino_d2, "load", lambda _: Finder(masks=True))

    def run(package):
        (snippet,) = [x for x in SNIPPETS if package in x.split("\n\n")[0]]
        exec(snippet, names := {})
        return names

    return run


def test_the_snippet_about_tiles_detects(supervision, run_snippet):
    assert sorted(objects_of(run_snippet("tiles")["instances"]))[0] == (0, 30, 10)


def test_the_snippet_about_supervision_hands_detections_over(supervision, run_snippet):
    found = run_snippet("supervision")["detections"]
    assert sorted(found["class_name"]) == sorted(CLASSES) and found.mask.shape == (3, 200, 300)
    assert found.xyxy[found.class_id == 1].tolist() == [[74, 50, 86, 62]]


def test_the_snippet_about_fiftyone_hands_detections_over(run_snippet):
    pytest.importorskip("fiftyone", reason="FiftyOne is missing")
    found = {x.label: x for x in run_snippet("fiftyone")["sample"]["dino"].detections}
    assert found.keys() == set(CLASSES) and found["blue"].confidence == 1
    box = 74 / 300, 50 / 200, SIDE / 300, SIDE / 200
    assert found["green"].bounding_box == pytest.approx(box)
    assert found["green"].mask.mean() > 0.8  # the row and column beyond are outside
