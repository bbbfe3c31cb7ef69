"""What each kind of error costs in AP, beside arithmetic, COCO's evaluation and a slow oracle."""

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_error_analysis import CAT, DOG, IMAGE, annotation, dataset, detection, random_case

from dino_d2.evaluation.analysis import analyse, evaluate_boxes, match_images
from dino_d2.evaluation.costs import COSTS, average_precisions, box_scores, outcomes_of
from dino_d2.evaluation.matching import IOUS, NEAR, without_duplicates


def ap_of(evaluation):
    """(I, K) AP in percent by COCO's evaluation."""
    precision = evaluation.eval["precision"][..., 0, -1]
    return 100 * np.where(precision < 0, np.nan, precision).mean(axis=1)


def outcomes(data, found):
    evaluation = evaluate_boxes(data, found)
    images = match_images(evaluation.cocoGt, evaluation.cocoDt.imgToAnns, 100)
    return evaluation, outcomes_of(images, evaluation.params.catIds)


@pytest.mark.parametrize("seed", range(6))
def test_with_nothing_fixed_ap_is_that_of_coco_evaluation(seed):
    """With crowds, equal scores, a class that is only detected, and more than 100 detections."""
    data, found = random_case(seed, categories=4, images=9)
    ids = [x["id"] for x in data["categories"]]
    first = found[0]
    found += [first | {"bbox": [9 * i, 5, 9, 9], "score": 0.5} for i in range(120)]
    found += [first | {"category_id": ids[-1]}]
    evaluation, mine = outcomes(data, found)
    assert evaluation.cocoGt.catToImgs[ids[-1]] == []
    np.testing.assert_allclose(average_precisions(mine), ap_of(evaluation), atol=1e-6)
    evaluation.summarize()
    np.testing.assert_allclose([*box_scores(mine).values()], 100 * evaluation.stats[:3], atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_of_masks_ap_is_that_of_coco_evaluation(seed):
    """True masks are halves of their boxes, and those of every second detection the whole box."""
    data, found = random_case(seed, categories=4, images=9)
    data["images"] = [x | {"width": 700, "height": 700} for x in data["images"]]
    for i, x in enumerate([*data["annotations"], *found]):
        left, top, width, height = x["bbox"]
        right, bottom = left + width, top + height
        x["segmentation"] = [[left, top, right, top, left, bottom]]
        if "score" in x and i % 2:
            x["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
    truth = COCO()
    truth.dataset = data
    truth.createIndex()
    results = [x | {"segmentation": truth.annToRLE(x)} for x in found]
    evaluation = COCOeval(truth, truth.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    analysis = analyse(evaluation)
    mine = outcomes_of(analysis.images, evaluation.params.catIds)
    np.testing.assert_allclose(average_precisions(mine), ap_of(evaluation), atol=1e-6)
    assert analysis.shape == "mask"


# What an oracle does, slowly: the data are changed, and COCO evaluates them anew


def overlap(bbox, other, crowd=False):
    (x, y, w, h), (a, b, c, d) = bbox, other
    shared = max(0, min(x + w, a + c) - max(x, a)) * max(0, min(y + h, b + d) - max(y, b))
    return shared / (w * h if crowd else w * h + c * d - shared)


def judged(truth, detections, least):
    """(kind, box) of each detection, in descending order of score, in an image at an IoU."""
    free, verdicts = list(truth), []
    for one in detections:
        of_class = [x for x in free if x["category_id"] == one["category_id"]]
        regular = [x for x in of_class if not x["iscrowd"]]
        hits = [x for x in regular if overlap(one["bbox"], x["bbox"]) >= least]
        crowds = [
            x for x in of_class if x["iscrowd"] and overlap(one["bbox"], x["bbox"], True) >= least
        ]
        if hits:
            best = max(hits, key=lambda x: overlap(one["bbox"], x["bbox"]))
            free.remove(best)
            verdicts.append(("correct", best))
        else:
            verdicts.append(("ignored", None) if crowds else error(truth, one, least))
    return verdicts


def error(truth, one, least):
    def nearest(boxes):
        pairs = [(overlap(one["bbox"], x["bbox"]), x) for x in boxes if not x["iscrowd"]]
        return max(pairs, key=lambda pair: pair[0], default=(0, None))

    same, own = nearest(x for x in truth if x["category_id"] == one["category_id"])
    other, foreign = nearest(x for x in truth if x["category_id"] != one["category_id"])
    if max(same, other) < NEAR:
        return "background", None
    if same >= other:
        return "duplicate" if same >= least else "localisation", own
    return "classification" if other >= least else "both", foreign


def fixed(data, found, kind, least):
    """The data set and the detections after an oracle has fixed a kind of error."""
    annotations, results = [], []
    for image in data["images"]:
        truth, detections = (
            [x for x in boxes if x["image_id"] == image["id"]]
            for boxes in (data["annotations"], found)
        )
        detections.sort(key=lambda x: -x["score"])
        verdicts = judged(truth, detections, least)
        taken = [box["id"] for verdict, box in verdicts if verdict == "correct"]
        hopeful = ("classification", "localisation")
        near = [box["id"] for verdict, box in verdicts if verdict in hopeful]
        for box in truth:
            missed = not box["iscrowd"] and box["id"] not in taken + near
            annotations += [] if kind == "missed" and missed else [box]
        for one, (verdict, box) in zip(detections, verdicts, strict=True):
            if verdict == kind:
                if kind not in hopeful or box["id"] in taken:
                    continue
                taken.append(box["id"])
                key = "category_id" if kind == "classification" else "bbox"
                one = one | {key: box[key]}
            results.append(one)
    return data | {"annotations": annotations}, results


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", COSTS)
def test_costs_are_what_an_oracle_wins(kind, seed):
    data, found = random_case(seed, images=8)
    evaluation, mine = outcomes(data, found)
    fast = average_precisions(mine, kind)
    for level in (0, 4, 9):
        slow = ap_of(evaluate_boxes(*fixed(data, found, kind, IOUS[level])))[level]
        np.testing.assert_allclose(fast[level], slow, atol=1e-6)
    assert np.nanmax(abs(fast - ap_of(evaluation))) > 0 or kind in ("duplicate", "background")


# By arithmetic

A, B = [10, 10, 20, 20], [50, 10, 20, 20]
TWO = [annotation(A), annotation(B, id=2)]
# Of two boxes the second is found by the third detection: precision is 1 at the recalls up to 0.5,
# of which there are 51, and 2/3 at the other 50 of the 101. Without what is between, it is 1.
THIRD = 100 * 50 / 3 / 101


@pytest.mark.parametrize(
    ("truth", "found", "kind", "cost"),
    [
        (TWO, [detection(A), detection(A, score=0.8), detection(B, score=0.7)], "duplicate", THIRD),
        (
            TWO,
            [detection(A), detection([70, 60, 9, 9], score=0.8), detection(B, score=0.7)],
            "background",
            THIRD,
        ),
        (  # next to the dog, IoU 0.45, at any IoU that counts
            [*TWO, annotation([10, 50, 20, 20], DOG, id=3)],
            [detection(A), detection([10, 50, 20, 9], score=0.8), detection(B, score=0.7)]
            + [detection([10, 50, 20, 20], DOG)],
            "both",
            THIRD / 2,  # as the dog has an AP of its own, which stays 100
        ),
        (TWO[:1], [detection(A, DOG)], "classification", 100),
        # The box is found by a lower score, so what was taken for a dog is suppressed.
        (
            [*TWO, annotation([10, 50, 20, 20], DOG, id=3)],
            [detection(A, DOG), detection([10, 50, 20, 20], DOG, 0.8), detection(A, score=0.1)]
            + [detection(B, score=0.1)],
            "classification",
            50 / 2,  # of the dogs' AP, where the only box came second
        ),
        (TWO[:1], [detection([10, 10, 20, 9])], "localisation", 100),
        (TWO[:1], [detection([10, 10, 20, 14.4])], "localisation", 50),  # right at 5 IoUs of 10
        # Both are next to the box: the surer is corrected, and the other is suppressed.
        (TWO, [detection(A), *2 * [detection([50, 10, 20, 9])]], "localisation", 100 * 50 / 101),
        (TWO, [detection(A)], "missed", 100 * 50 / 101),
        (  # nor is a box in a crowd region wrong
            [*TWO[:1], annotation([50, 0, 50, 50], id=2, crowd=1)],
            [detection(B), detection(A, score=0.8)],
            None,
            0,
        ),
    ],
)
def test_a_kind_costs(truth, found, kind, cost):
    costs = analyse(evaluate_boxes(dataset(*truth), found)).costs.mean
    expected = dict.fromkeys(COSTS, 0) | ({kind: cost} if kind else {})
    assert costs == pytest.approx(expected, abs=1e-6)


def test_a_class_of_which_no_box_is_left_does_not_count():
    data = dataset(annotation(A), annotation(B, DOG, id=2))
    costs = analyse(evaluate_boxes(data, [detection(A)])).costs
    assert costs.mean["missed"] == pytest.approx(50)  # AP rises from the mean of 100 and 0 to 100
    assert costs.classes[-1, 0] == 0 and np.isnan(costs.classes[-1, 1])


def test_without_detections_no_cost_is_known():
    costs = analyse(evaluate_boxes(dataset(annotation(A)), [])).costs
    assert np.isnan(costs.mean.pop("missed")) and set(costs.mean.values()) == {0}


def test_nms_takes_the_less_sure_of_a_class_and_an_image():
    near = [10, 10, 20, 19]  # IoU 0.95
    kept = [detection(A), detection(near, DOG), detection([10, 10, 20, 15], score=0.3)]
    others = [detection(near, score=0.5, image=5)]
    found = [detection(near, score=0.8), *kept, *others]
    assert without_duplicates(found, 0.8) == [*kept, *others]
    assert without_duplicates([], 0.8) == []


def test_images_are_in_coco_order_whatever_the_order_of_the_file():
    """Of equal scores those of the first image, by id, come first."""
    images = [IMAGE | {"id": 9}, IMAGE]
    data = dataset(annotation(A), annotation(A, id=2, image=9), images=images)
    evaluation, mine = outcomes(data, [detection(B, image=9), detection(A, CAT)])
    # Were the background first, precision would be 1/2.
    assert average_precisions(mine)[0, 0] == pytest.approx(100 * 51 / 101)
    assert ap_of(evaluation)[0, 0] == pytest.approx(100 * 51 / 101)
