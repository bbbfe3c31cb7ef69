"""Which detection finds which object, what follows for every class, and the files that say so."""

import csv
import json
import random

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image, ImageColor
from pycocotools.cocoeval import COCOeval
from torch import tensor

from dino_d2.data import DatasetError, read_results, register
from dino_d2.engine.evaluator import ErrorAnalysisEvaluator, advice, write_analysis
from dino_d2.evaluation.analysis import (
    analyse,
    best_threshold,
    evaluate_boxes,
    thresholds,
    worst_first,
)
from dino_d2.evaluation.matching import ImageMatches, confusions, detection_kinds, match_image
from dino_d2.visualize import draw_error_plots, draw_image_errors, error_plots
from dino_d2.visualize.style import GREY, SKY, VERMILION, YELLOW

IMAGE = {"id": 4, "file_name": "4.png", "width": 100, "height": 80}
CAT, DOG = 3, 7  # ids with gaps
FILES = ("per_class", "ap_by_size", "precision_recall", "confusion_matrix", "errors")


def annotation(bbox, category=CAT, id=1, crowd=0, image=4):
    entry = {"id": id, "image_id": image, "category_id": category, "bbox": bbox}
    return entry | {"area": bbox[2] * bbox[3], "iscrowd": crowd}


def detection(bbox, category=CAT, score=0.9, image=4):
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score}


def dataset(*annotations, names=("cat", "dog"), ids=(CAT, DOG), images=(IMAGE,)):
    categories = [{"id": id, "name": name} for id, name in zip(ids, names, strict=True)]
    return {"images": list(images), "annotations": list(annotations), "categories": categories}


def random_case(seed, categories=3, images=4):
    """Boxes of all sizes and crowd regions, of which nearly all are detected more or less well."""
    rng = random.Random(seed)
    ids = [5 * k + 2 for k in range(categories)]
    records = [IMAGE | {"id": 3 * i, "file_name": f"{i}.png"} for i in range(images)]
    truth, found = [], []
    for record in records:
        for _ in range(rng.randrange(9)):
            bbox = [rng.uniform(0, 300), rng.uniform(0, 300), *(rng.uniform(4, 200) for _ in "wh")]
            category, crowd = rng.choice(ids[:-1]), int(rng.random() < 0.2)
            truth.append(annotation(bbox, category, len(truth) + 1, crowd, record["id"]))
        for entry in [x for x in truth if x["image_id"] == record["id"]]:
            for _ in range(rng.randrange(4)):
                moved = [x * rng.uniform(0.8, 1.2) for x in entry["bbox"]]
                category = entry["category_id"] if rng.random() < 0.8 else rng.choice(ids)
                score = round(rng.random(), 1)  # some scores are equal
                found.append(detection(moved, category, score, record["id"]))
    names = [f"class {id}" for id in ids]
    return dataset(*truth, names=names, ids=ids, images=records), found


def matched(annotations, detections):
    return match_image(IMAGE, annotations, detections, 100)


# Which detection finds which object


@pytest.mark.parametrize("seed", range(12))
def test_what_finds_what_is_as_in_coco_evaluation(seed, monkeypatch):
    # The fast evaluation of Detectron2 does not say what it matched.
    monkeypatch.setattr("dino_d2.evaluation.analysis.COCOeval_opt", COCOeval)
    data, found = random_case(seed)
    evaluation = evaluate_boxes(data, found)
    images = {x.image["id"]: x for x in analyse(evaluation).images}
    checked = 0
    for entry in evaluation.evalImgs:
        if entry is None or entry["aRng"] != evaluation.params.areaRng[0]:
            continue
        image = images[entry["image_id"]]
        of_class = [
            number
            for number, x in enumerate(image.detections)
            if x["category_id"] == entry["category_id"]
        ]
        ids = [x["id"] for x in image.truth] + [0]
        assert [ids[image.matches[n]] for n in of_class] == entry["dtMatches"][0].tolist()
        assert image.ignored[of_class].tolist() == entry["dtIgnore"][0].tolist()
        checked += len(of_class)
    assert checked


def test_no_more_detections_count_than_in_coco_evaluation():
    data = dataset(annotation([10, 10, 20, 20]))
    many = [detection([60, 60, 10, 10], score=0.9)] * 100 + [detection([10, 10, 20, 20], score=0.5)]
    analysis = analyse(evaluate_boxes(data, many), 0.1)
    assert analysis.sizes[0].AP == 0 and analysis.errors[0].correct == 0


def test_as_many_detections_count_as_the_evaluation_is_told():
    data = dataset(annotation([10, 10, 20, 20]))
    many = [detection([60, 60, 10, 10], score=0.9)] * 100 + [detection([10, 10, 20, 20], score=0.5)]
    evaluation = evaluate_boxes(data, many)
    evaluation.params.maxDets = [1, 10, 300]
    evaluation.evaluate()
    evaluation.accumulate()
    analysis = analyse(evaluation, 0.1)
    assert analysis.classes[0].AR == 100 and analysis.errors[0][2:] == (1, 0, 0, 0, 0, 100, 0)


@pytest.mark.parametrize(
    ("bbox", "category", "kind"),
    [
        ([10, 10, 20, 20], CAT, "correct"),
        ([10, 10, 20, 10], CAT, "correct"),  # IoU 0.5
        ([10, 10, 20, 9], CAT, "localisation"),  # IoU 0.45
        ([10, 10, 20, 2], CAT, "localisation"),  # IoU 0.1
        ([10, 10, 20, 1.9], CAT, "background"),
        ([10, 10, 20, 20], DOG, "classification"),
        ([10, 10, 20, 10], DOG, "classification"),
        ([10, 10, 20, 9], DOG, "both"),
        ([60, 50, 20, 20], DOG, "background"),
        ([60, 10, 20, 20], CAT, "ignored"),  # inside the crowd region
        ([60, 10, 20, 20], DOG, "background"),  # which is of another class
    ],
)
def test_a_detection_is(bbox, category, kind):
    truth = [annotation([10, 10, 20, 20]), annotation([50, 0, 50, 40], id=2, crowd=1)]
    assert detection_kinds(matched(truth, [detection(bbox, category)])) == [kind]


@pytest.mark.parametrize(
    ("same", "other", "kind"),  # heights of objects of both classes, so IoUs in 20ths
    [
        (11, 20, "classification"),  # IoU 0.55 with an object that is found, and 1.00
        (20, 20, "duplicate"),
        (3, 9, "both"),  # 0.15 and 0.45
        (9, 9, "localisation"),
        (9, 3, "localisation"),
    ],
)
def test_the_greater_overlap_decides_and_at_equal_ones_the_class(same, other, kind):
    truth = [annotation([10, 10, 20, same]), annotation([10, 10, 20, other], DOG, id=2)]
    surer = detection([10, 10, 20, same], score=0.95)
    matching = matched(truth, [surer, detection([10, 10, 20, 20], score=0.5)])
    assert detection_kinds(matching) == ["correct", kind]


def test_the_less_sure_of_two_is_a_duplicate():
    both = [detection([10, 10, 20, 19], score=0.6), detection([10, 10, 20, 20], score=0.5)]
    matching = matched([annotation([10, 10, 20, 20])], both)
    assert detection_kinds(matching) == ["correct", "duplicate"]
    assert matching.detections[0]["score"] == 0.6


def test_a_detection_below_the_threshold_finds_nothing():
    matching = matched([annotation([10, 10, 20, 20])], [detection([10, 10, 20, 20], score=0.4)])
    assert not matching.missed.any()
    assert matching.above(0.4).missed.tolist() == [False]
    assert matching.above(0.5).missed.tolist() == [True]
    assert detection_kinds(matching.above(0.5)) == []


def test_the_right_class_finds_an_object_before_a_surer_wrong_one():
    pair = [detection([10, 10, 20, 20], DOG, 0.9), detection([10, 10, 20, 20], CAT, 0.6)]
    matching = matched([annotation([10, 10, 20, 20])], pair)
    assert matching.matches.tolist() == [-1, 0] and confusions(matching).tolist() == [-1, -1]


def test_a_detection_that_is_right_is_not_confused_with_a_neighbour():
    truth = [annotation([10, 10, 20, 20]), annotation([10, 10, 20, 19], DOG, id=2)]
    matching = matched(truth, [detection([10, 10, 20, 20])])
    assert matching.matches.tolist() == [0] and confusions(matching).tolist() == [-1]
    assert matching.missed.tolist() == [False, True]


# Numbers


@pytest.mark.parametrize("seed", range(6))
def test_ap_is_that_of_coco_evaluation(seed, capsys):
    evaluation = evaluate_boxes(*random_case(seed))
    analysis = analyse(evaluation)
    evaluation.summarize()
    means = analysis.sizes
    mine = [means[0].AP, means[0].AP50, means[0].AP75, *(x.AP for x in means[1:])]
    mine += [x.AR for x in means]
    theirs = np.where(evaluation.stats < 0, np.nan, 100 * evaluation.stats)
    np.testing.assert_allclose(mine, theirs[[0, 1, 2, 3, 4, 5, 8, 9, 10, 11]])
    for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR"):
        column = np.array([getattr(x, key) for x in analysis.classes])
        mean = {"APs": means[1].AP, "APm": means[2].AP, "APl": means[3].AP}
        expected = mean.get(key, getattr(means[0], key, None))
        np.testing.assert_allclose(column[~np.isnan(column)].mean(), expected)


def test_best_threshold_has_the_greatest_f1_of_all():
    rng = random.Random(0)
    outcomes = [(round(rng.random(), 1), rng.random() < 0.5) for _ in range(40)]
    boxes = 30

    def f1(threshold):
        kept = [found for score, found in outcomes if score >= threshold]
        return 2 * sum(kept) / (len(kept) + boxes)

    threshold, precision, recall, best = best_threshold(outcomes, boxes)
    assert best / 100 == pytest.approx(f1(threshold))
    assert best / 100 == pytest.approx(max(f1(score) for score, _ in outcomes))
    kept = [found for score, found in outcomes if score >= threshold]
    assert precision == pytest.approx(100 * np.mean(kept))
    assert recall == pytest.approx(100 * sum(kept) / boxes)


def test_detections_of_one_score_are_kept_together():
    _, precision, recall, _ = best_threshold([(0.5, False), (0.5, True), (0.5, False)], 1)
    assert (precision, recall) == (pytest.approx(100 / 3), 100)


@pytest.mark.parametrize(("outcomes", "boxes"), [([], 3), ([(0.5, False)], 3), ([(0.5, False)], 0)])
def test_there_is_no_best_threshold_where_nothing_is_found(outcomes, boxes):
    assert np.isnan(best_threshold(outcomes, boxes)).all()


def two_scales():
    """Cats are found with scores from 0.4 on, dogs with scores from 0.8 on; others are wrong."""
    a, b, c, nothing = [0, 0, 20, 20], [30, 0, 20, 20], [60, 0, 20, 20], [60, 50, 9, 9]
    data = dataset(annotation(a), annotation(b, id=2), annotation(c, DOG, id=3))
    scored = ((a, CAT, 0.6), (b, CAT, 0.4), (nothing, CAT, 0.2), (c, DOG, 0.8), (nothing, DOG, 0.5))
    return data, [detection(*one) for one in scored]


def test_a_class_has_its_threshold_and_all_together_have_one():
    # Together, F1 at 0.8, 0.6, 0.5 and 0.4 is 2/4, 4/5, 4/6 and 6/7; 6/8 at 0.2.
    analysis = analyse(evaluate_boxes(*two_scales()))
    assert thresholds(analysis) == {"all": 0.4, "classes": {"cat": 0.4, "dog": 0.8}}
    assert analysis.overall == pytest.approx((0.4, 75, 100, 100 * 6 / 7))
    nothing = analyse(evaluate_boxes(dataset(annotation([0, 0, 9, 9])), []))
    assert thresholds(nothing) == {"all": None, "classes": {}}


def test_detections_are_counted_from_the_threshold_of_their_class_on():
    data, found = two_scales()
    names = {"ids": (CAT, DOG, 9), "names": ("cat", "dog", "bird")}
    data = dataset(*data["annotations"], **names)
    found += [detection([60, 50, 9, 9], 9, score) for score in (0.35, 0.65)]  # no bird is annotated
    evaluation = evaluate_boxes(data, found)
    at_best, at_half = analyse(evaluation, None), analyse(evaluation, 0.5)
    assert [x[2:] for x in at_best.errors] == [
        (2, 0, 0, 0, 0, 0, 0),
        (1, 0, 0, 0, 0, 0, 0),
        (0, 0, 0, 0, 0, 1, 0),  # from the threshold of all on, which is 0.4
    ]
    assert [x.correct for x in at_half.errors] == [1, 1, 0]
    assert [x.background for x in at_half.errors] == [0, 1, 1]
    scores = [x["score"] for image in at_best.shown for x in image.detections]
    assert scores == [0.8, 0.65, 0.6, 0.4]
    assert (at_best.limit, at_half.limit) == ("score ≥ that of best F1", "score ≥ 0.5")
    assert analyse(evaluate_boxes(data, []), None).limit == "score ≥ 0.5"


def test_confusions_are_counted_by_true_and_detected_class():
    truth = [
        annotation([0, 0, 20, 20]),
        annotation([30, 0, 20, 20], id=2),
        annotation([60, 0, 20, 20], DOG, id=3),
        annotation([0, 40, 40, 40], id=4, crowd=1),
    ]
    found = [
        detection([0, 0, 20, 20]),  # a cat
        detection([30, 0, 20, 20], DOG),  # a cat taken for a dog
        detection([30, 0, 20, 19], DOG, 0.8),  # once more: nothing is left there
        detection([0, 40, 20, 20]),  # in the crowd
        detection([60, 0, 20, 20], DOG, 0.3),  # not sure enough
    ]
    analysis = analyse(evaluate_boxes(dataset(*truth), found), 0.5)
    assert analysis.confusion.tolist() == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert [x.missed for x in analysis.errors] == [1, 1]
    assert [x.classification for x in analysis.errors] == [0, 2]


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_the_confusion_matrix_are_all_boxes_and_columns_all_detections(seed):
    data, found = random_case(seed)
    analysis = analyse(evaluate_boxes(data, found), 0.3)
    boxes = [x.boxes for x in analysis.classes]
    assert analysis.confusion[:-1].sum(axis=1).tolist() == boxes
    errors = [sum(x[2:-1]) for x in analysis.errors]  # of every kind, and correct
    assert analysis.confusion[:, :-1].sum(axis=0).tolist() == errors
    assert np.diag(analysis.confusion)[:-1].tolist() == [x.correct for x in analysis.errors]


def test_without_detections_everything_is_missed():
    analysis = analyse(evaluate_boxes(dataset(annotation([10, 10, 20, 20])), []))
    cat, dog = analysis.classes
    assert cat.AP == 0 and np.isnan(cat.best_threshold) and analysis.errors[0].missed == 1
    assert dog.boxes == 0 and np.isnan(dog.AP) and np.isnan(dog.AR)


def test_the_worst_image_comes_first_and_sure_mistakes_weigh_more():
    images = [IMAGE | {"id": i} for i in range(4)]
    data = dataset(annotation([10, 10, 20, 20], image=3), images=images)
    mistakes = [detection([60, 50, 9, 9], score=s, image=i) for i, s in ((0, 0.6), (2, 0.9))]
    ranked = worst_first(analyse(evaluate_boxes(data, mistakes)))
    assert [(badness, x.image["id"]) for badness, x in ranked] == [
        (1, 3),
        (0.9, 2),
        (0.6, 0),
        (0, 1),
    ]


def test_annotations_stay_as_they_are():
    data, found = random_case(0)
    before = json.dumps([data, found])
    analyse(evaluate_boxes(data, found))
    assert json.dumps([data, found]) == before


# Files


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


NAMES = ('cat, "big"', "hund; ä\nnew line")


def two_classes():
    """Of which one has a box, which is found, and of the other is detected what is not there."""
    found = [detection([10, 10, 20, 20]), detection([60, 50, 9, 9], DOG, 0.8)]
    return analyse(evaluate_boxes(dataset(annotation([10, 10, 20, 20]), names=NAMES), found))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Their folder; pictures are left out, which take a second."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dino_d2.engine.evaluator.draw_error_plots", lambda analysis, folder: [])
        write_analysis(two_classes(), folder)
    return folder


def test_the_legend_of_curves_has_every_class_and_is_whole():
    names = ("_hidden", "W" * 30, "M" * 30, "a", "b", "c")
    data = dataset(*(annotation([10, 10, 20, 20], k) for k in range(1, 7)))
    data["categories"] = [{"id": k, "name": name} for k, name in enumerate(names, start=1)]
    figure = error_plots._precision_recall(analyse(evaluate_boxes(data, [])))
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend()
    box, canvas = legend.get_window_extent(), figure.bbox
    assert any("_hidden" in text.get_text() for text in legend.get_texts())
    assert len(legend.get_texts()) == len(names)
    assert canvas.x0 <= box.x0 and box.x1 <= figure.axes[1].bbox.x0


@pytest.mark.slow
def test_there_are_a_table_and_a_picture_of_each_kind(tmp_path):
    pictures = write_analysis(two_classes(), tmp_path)
    assert [x.name for x in pictures] == [f"{name}.png" for name in FILES]
    names = {x.name for x in tmp_path.iterdir()}
    assert names == {f"{x}.{y}" for x in FILES for y in ("png", "csv")}
    assert all(Image.open(path).size[0] > 400 for path in pictures)


def test_names_survive_in_tables(tables):
    folder = tables
    assert [row[1] for row in rows(folder / "per_class.csv")[1:]] == list(NAMES)
    assert [row[1] for row in rows(folder / "errors.csv")[1:]] == list(NAMES)
    matrix = rows(folder / "confusion_matrix.csv")
    assert matrix[0] == ["true class", *NAMES, "(background)"]
    assert [row[1:] for row in matrix[1:]] == [["1", "0", "0"], ["0", "0", "0"], ["0", "1", "0"]]


def test_a_cell_without_a_value_is_empty(tables):
    folder = tables
    head, cat, dog = rows(folder / "per_class.csv")
    assert dict(zip(head, cat, strict=True)) == {
        **{"category_id": "3", "name": 'cat, "big"', "boxes": "1", "AP": "100", "AP50": "100"},
        **{"AP75": "100", "APs": "100", "APm": "", "APl": "", "AR": "100"},
        **{"best_threshold": "0.9", "precision": "100", "recall": "100", "F1": "100"},
    }
    assert dog[3:] == [""] * 11


def test_curves_have_a_row_for_every_recall(tables):
    folder = tables
    head, *curves = rows(folder / "precision_recall.csv")
    assert head == ["category_id", "name", "iou", "recall", "precision", "score"]
    assert len(curves) == 2 * 2 * 101  # classes, IoUs, recalls
    assert curves[100][2:] == ["0.5", "1", "1", "0.9"] and curves[101][2:4] == ["0.75", "0"]
    assert curves[-1][4] == ""


def test_errors_have_their_number_and_their_cost(tables):
    head, cat, dog = (row[2:] for row in rows(tables / "errors.csv"))
    kinds = ["classification", "localisation", "both", "duplicate", "background", "missed"]
    assert head == ["correct", *kinds, *(f"dAP_{x}" for x in kinds)]
    assert cat == ["1", *6 * ["0"], *6 * ["0"]]
    assert dog == ["0", *4 * ["0"], "1", "0", *6 * [""]]  # without boxes AP has no value


def test_best_thresholds_are_marked_where_precision_and_recall_are():
    left = error_plots._precision_recall(analyse(evaluate_boxes(*two_scales()))).axes[0]
    marks = [tuple(x.get_offsets()[0]) for x in left.collections]
    assert marks == [(1, 1), (1, 1), (1, 0.75)]
    labels = [x.get_text() for x in left.get_legend().get_texts()]
    assert labels[0] == "AP50 100.0, best F1 100.0 at score 0.40: cat"
    assert labels[-1] == "all classes together, best F1 85.7 at score 0.40"


def test_the_picture_of_errors_has_numbers_and_costs():
    data = dataset(annotation([10, 10, 20, 20]))
    twice = [detection([10, 10, 20, 20], score=score) for score in (0.9, 0.8)]
    found = [*twice, detection([60, 50, 9, 9], score=0.95)]
    left, right = error_plots._errors(analyse(evaluate_boxes(data, found))).axes
    numbers, costs = ([round(x.get_width(), 1) for x in axes.patches] for axes in (left, right))
    assert numbers == [1, 0, 0, 0, 1, 1, 0] and costs == [0, 0, 0, 0, 50, 0]


@pytest.mark.slow
def test_a_data_set_of_nothing_but_crowds_can_be_drawn(tmp_path):
    crowd = dataset(annotation([10, 10, 20, 20], crowd=1))
    assert len(draw_error_plots(analyse(evaluate_boxes(crowd, [])), tmp_path)) == 5


def test_of_many_classes_the_most_confused_are_drawn_and_the_others_summed():
    ids = range(1, 61)
    truth = [annotation([0, 0, 20, 20], id, id, image=id) for id in ids]
    found = [detection([0, 0, 20, 20], 2 if id == 50 else id, image=id) for id in ids]
    data = dataset(
        *truth, names=[f"c{i}" for i in ids], ids=ids, images=[IMAGE | {"id": i} for i in ids]
    )
    analysis = analyse(evaluate_boxes(data, found))
    names, counts, title = error_plots._confused(analysis)
    assert "25 of 60" in title and {"c2", "c50", "(other classes)"} <= set(names)
    assert counts[names.index("c50"), names.index("c2")] == 1
    assert counts.sum() == analysis.confusion.sum() and counts[-2, -2] == 35
    axes = error_plots._per_class(analysis).axes[0]
    assert "20 best and the 20 worst of 60" in axes.get_title(loc="left")
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == 40 and labels[0] == "c50 (1 box)"  # at the bottom: it is not found
    left = error_plots._precision_recall(analysis).axes[0]
    assert "60 classes" in left.get_title(loc="left") and len(left.lines) == 66


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 300])
def test_pictures_of_any_number_of_classes_have_a_bounded_size(number, tmp_path):
    ids = range(1, number + 1)
    names = [f"${i}$ a class of a name that is long, {i}" for i in ids]
    data = dataset(*(annotation([0, 0, 20, 20], id, id) for id in ids), names=names, ids=ids)
    found = [detection([0, 0, 20, 20], id) for id in ids]
    for path in write_analysis(analyse(evaluate_boxes(data, found)), tmp_path) and tmp_path.glob(
        "*.png"
    ):
        assert max(Image.open(path).size) < 2500


# A picture of an image


def count(picture, colour):
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.asarray(picture) == rgb).all(axis=-1).sum())


@pytest.mark.parametrize(
    ("found", "left", "right"),
    [
        ([detection([20, 20, 40, 40])], SKY, SKY),
        ([detection([20, 20, 40, 40], DOG)], YELLOW, VERMILION),
        ([], YELLOW, None),
    ],
)
def test_found_wrong_and_missed_have_their_colours(found, left, right):
    matching = matched([annotation([20, 20, 40, 40])], found)
    pair = draw_image_errors(Image.new("RGB", (100, 80)), matching, {CAT: "cat", DOG: "dog"}, 300)
    assert pair.size == (2 * 300 + 12, 240)
    halves = pair.crop((0, 0, 300, 240)), pair.crop((312, 0, 612, 240))
    for half, expected in zip(halves, (left, right), strict=True):
        drawn = {colour for colour in (SKY, VERMILION, YELLOW) if count(half, colour)}
        assert drawn == {expected} - {None}


def test_what_is_found_is_drawn_on_top_of_what_is_wrong():
    """Of a surer class of the same query, and of a surer box that shares its left side."""
    found = [detection([20, 20, 40, 40], score=0.5)]
    for wrong in ([20, 20, 40, 40], [20, 20, 40, 60]):
        both = [detection(wrong, DOG), *found]
        matching = matched([annotation([20, 20, 40, 40])], both)
        pair = draw_image_errors(Image.new("RGB", (100, 80)), matching, {CAT: "c", DOG: "d"}, 300)
        assert pair.getpixel((312 + 60, 120)) == ImageColor.getrgb(SKY)
        assert count(pair.crop((312, 0, 612, 240)), VERMILION)  # in the label, or below


def test_lines_differ_too():
    lengths = {}
    for kind, found in (("found", [detection([20, 20, 40, 40])]), ("missed", [])):
        matching = matched([annotation([20, 20, 40, 40])], found)
        pair = draw_image_errors(Image.new("RGB", (100, 80)), matching, {CAT: ""}, 300)
        lengths[kind] = count(pair.crop((0, 0, 300, 240)), SKY if found else YELLOW)
    assert lengths["missed"] < 0.7 * lengths["found"]


def test_a_crowd_region_is_drawn_in_grey():
    matching = matched([annotation([20, 20, 40, 40], crowd=1)], [detection([20, 20, 30, 30])])
    pair = draw_image_errors(Image.new("RGB", (100, 80)), matching, {CAT: "c" * 40}, 300)
    assert count(pair, GREY) and not any(count(pair, x) for x in (SKY, VERMILION, YELLOW))


# Evaluation


def instances(*boxes):
    """Detections of the first class, in descending order of score, from 0.9."""
    result = Instances(
        (80, 100),
        pred_boxes=Boxes(tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]).reshape(-1, 4)),
    )
    result.scores = tensor([0.9 - 0.1 * i for i in range(len(boxes))])
    result.pred_classes = tensor([0] * len(boxes))
    return result


@pytest.fixture
def registered(tmp_path, without_plots):
    """A data set of one box."""
    Image.new("RGB", (100, 80)).save(tmp_path / "4.png")
    (tmp_path / "val.json").write_text(json.dumps(dataset(annotation([10, 10, 20, 20]))))
    name = f"{tmp_path}/val.json@{tmp_path}"
    register(name)
    yield name
    DatasetCatalog.remove(name)


def test_the_evaluator_finds_what_detectron2_does_and_leaves_the_analysis(registered, tmp_path):
    results = {}
    for kind in (COCOEvaluator, ErrorAnalysisEvaluator):
        evaluator = kind(registered, output_dir=str(tmp_path / kind.__name__))
        evaluator.reset()
        evaluator.process([{"image_id": 4}], [{"instances": instances([10, 10, 20, 20])}])
        results[kind] = evaluator.evaluate()["bbox"]
    np.testing.assert_equal(*results.values())
    table = rows(tmp_path / "ErrorAnalysisEvaluator" / "per_class.csv")
    assert table[1][3] == "100" and results[ErrorAnalysisEvaluator]["AP-cat"] == pytest.approx(100)


A, NEARLY_A, B = [10, 10, 20, 20], [10, 10, 20, 19], [50, 10, 20, 20]


def evaluated(name, outputs, images=(4,), **options):
    evaluator = ErrorAnalysisEvaluator(name, **options)
    evaluator.reset()
    evaluator.process([{"image_id": image} for image in images], outputs)
    return evaluator, evaluator.evaluate()


def test_ap_with_nms_is_that_of_a_model_that_applies_it(registered, caplog):
    """The box is found by the second: AP 50, and 100 without the first, which NMS does not take."""
    caplog.set_level("INFO")
    found = [B, A, NEARLY_A]
    _, results = evaluated(registered, [{"instances": instances(*found)}])
    assert list(results) == ["bbox", "dAP", "with_nms", "F1"]
    assert results["with_nms"] == pytest.approx({"AP": 50, "AP50": 50, "AP75": 50})
    assert results["dAP"]["background"] == pytest.approx(50)
    (told,) = (x.message for x in caplog.records if "costs most" in x.message)
    assert told.endswith("'background' costs most: 50.0 AP (AP is 50.0, and 50.0 with NMS 0.8)")


def test_ap_without_nms_is_that_of_what_was_kept_and_removed(registered, tmp_path):
    """Of the same score the one that was kept comes first, so the box is found by the second."""
    outputs = [{"instances": instances(B), "suppressed": instances(A, NEARLY_A)}]
    _, results = evaluated(registered, outputs, output_dir=str(tmp_path / "out"))
    assert list(results) == ["bbox", "dAP", "without_nms"]  # and no threshold, as nothing is found
    assert results["bbox"]["AP"] == 0 and results["dAP"]["duplicate"] == 0
    assert results["without_nms"] == pytest.approx({"AP": 50, "AP50": 50, "AP75": 50})
    kept = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert [(x["bbox"], x["category_id"]) for x in kept] == [(B, CAT)]


def test_thresholds_are_left_for_who_applies_the_model(registered, tmp_path):
    outputs = [{"instances": instances(A)}]
    _, results = evaluated(registered, outputs, output_dir=str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "thresholds.json").read_text())
    assert written == {"all": pytest.approx(0.9), "classes": {"cat": pytest.approx(0.9)}}
    assert results["F1"] == {"threshold": written["all"], "threshold-cat": written["all"]}


@pytest.mark.parametrize("rest", [{}, {"suppressed": instances()}])
def test_without_detections_there_is_nothing_to_say(registered, rest, caplog):
    caplog.set_level("INFO")
    _, results = evaluated(registered, [{"instances": instances()} | rest])
    other = results["without_nms" if rest else "with_nms"]
    assert np.isnan(results["bbox"]["AP"]) and other == {"AP": 0, "AP50": 0, "AP75": 0}
    assert "F1" not in results
    assert not [x for x in caplog.records if x.name == "dino_d2.engine.evaluator"]


@pytest.mark.parametrize(
    ("duplicate", "ap", "other", "has_nms", "sentence"),
    [
        (7.94, 39.8, 49.6, False, "duplicates cost 7.9 AP (AP is 39.8, and 49.6 with NMS 0.8): "
         "train longer, or evaluate with TEST.NMS 0.8 (model.nms=0.8)"),
        (1.2, 39.8, 39.5, False, "duplicates cost 1.2 AP (AP is 39.8, and 39.5 with NMS 0.8): "
         "train longer"),
        (1.2, 39.8, 35.5, True, "duplicates cost 1.2 AP (AP is 39.8, and 35.5 without NMS): "
         "train longer, or lower TEST.NMS (model.nms)"),
        (0.9, 39.8, 40.1, False, "of all types of errors, 'localisation' costs most: 5.0 AP (AP is "
         "39.8, and 40.1 with NMS 0.8)"),
    ],
)  # fmt: skip
def test_one_sentence_says_what_to_do(duplicate, ap, other, has_nms, sentence):
    costs = {"localisation": 5.0, "duplicate": duplicate, "missed": float("nan")}
    name = "without_nms" if has_nms else "with_nms"
    assert advice({"bbox": {"AP": ap}, "dAP": costs, name: {"AP": other}}) == sentence


@pytest.mark.slow
def test_an_evaluation_without_detections_leaves_no_older_analysis(registered, tmp_path):
    evaluator = ErrorAnalysisEvaluator(registered, output_dir=str(tmp_path))
    for found in ([[10, 10, 20, 20]], []):
        evaluator.reset()
        evaluator.process([{"image_id": 4}], [{"instances": instances(*found)}])
        evaluator.evaluate()
    assert rows(tmp_path / "per_class.csv")[1][3] == "0"


def test_the_evaluator_writes_nothing_without_a_folder(registered, tmp_path):
    before = set(tmp_path.iterdir())
    evaluator = ErrorAnalysisEvaluator(registered)
    evaluator.reset()
    evaluator.process([{"image_id": 4}], [{"instances": instances([10, 10, 20, 20])}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    assert set(tmp_path.iterdir()) == before


# Files of results


GOOD = detection([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "not JSON"),
        ({"annotations": []}, "a dict, not a list of detections"),
        ([GOOD, 5], "detection 1 has no image_id"),
        ([{k: v for k, v in GOOD.items() if k != "score"}], "has no score"),
        ([GOOD | {"image_id": 5}], "image_id 5"),
        ([GOOD | {"image_id": "4"}], "image_id '4'"),
        ([GOOD | {"file_name": "a/5.png"}], "'5.png', but image_id 4 is '4.png'"),
        ([GOOD | {"category_id": 4}], "category_id 4"),
        ([GOOD | {"bbox": [1, 2, 3]}], r"bbox \[1, 2, 3\]"),
        ([GOOD | {"bbox": [1, 2, 3, float("nan")]}], "finite"),
        ([GOOD | {"score": None}], "score None"),
        ([GOOD | {"score": 5}], "score 5: give a number from 0 to 1"),
        ([GOOD | {"file_name": None}], "file_name None"),
        ([GOOD | {"bbox": [1, 2, -3, 4]}], "make its width and height 0 or more"),
    ],
)
def test_results_that_do_not_fit_are_refused(content, words, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DatasetError, match=words) as error:
        read_results(path, dataset())
    assert str(path) in str(error.value)


def test_missing_results_name_the_nearest_file(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(DatasetError, match=r"did you mean: .*results\.json"):
        read_results(tmp_path / "result.json", dataset())


def test_a_folder_of_results_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="are a folder: give the JSON file"):
        read_results(tmp_path, dataset())


def test_results_with_other_keys_are_read(tmp_path):
    found = [GOOD | {"file_name": "somewhere/4.png", "category": "cat"}]
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert read_results(tmp_path / "results.json", dataset()) == found


def test_matchings_of_an_empty_image_are_empty():
    empty = matched([], [])
    assert (
        isinstance(empty, ImageMatches)
        and detection_kinds(empty) == []
        and empty.missed.tolist() == []
    )
