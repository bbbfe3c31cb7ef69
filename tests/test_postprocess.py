import pytest
import torch
from torchvision.ops import batched_nms

from dino_d2.modeling.postprocess import non_maximum_suppression, postprocess
from dino_d2.structures import Detections, Predictions

# two queries, three classes
PROBABILITIES = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 0.4]])
BOXES = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]])


@pytest.fixture
def predictions():
    return Predictions(PROBABILITIES.logit()[None], BOXES[None])


def test_the_best_pairs_of_query_and_class_are_kept_best_first(predictions):
    (instances,) = postprocess(predictions, [(100, 100)], 4)
    # query 0 class 1, query 1 class 0, query 1 class 2, query 0 class 2
    torch.testing.assert_close(instances.scores, torch.tensor([0.9, 0.8, 0.4, 0.3]))
    assert instances.pred_classes.tolist() == [1, 0, 2, 2]
    lefts = instances.pred_boxes.tensor[:, 0]
    torch.testing.assert_close(lefts, torch.tensor([40.0, 0.0, 0.0, 40.0]))


def test_boxes_are_corners_in_pixels_of_the_image(predictions):
    (instances,) = postprocess(predictions, [(100, 200)], 2)
    assert instances.image_size == (100, 200)
    # x 0.4 to 0.6 of 200, y 0.3 to 0.7 of 100; x 0 to 0.5 of 200, y 0.5 to 1 of 100
    expected = torch.tensor([[80.0, 30.0, 120.0, 70.0], [0.0, 50.0, 100.0, 100.0]])
    torch.testing.assert_close(instances.pred_boxes.tensor, expected)


def test_there_are_no_more_detections_than_pairs(predictions):
    (instances,) = postprocess(predictions, [(100, 100)], 300)
    assert len(instances) == 6


def test_images_have_their_own_detections_and_sizes(make_predictions):
    predictions = make_predictions(3)
    sizes = [(10, 20), (30, 40), (50, 60)]
    for i, instances in enumerate(postprocess(predictions, sizes, 7)):
        alone = Predictions(*(x[i : i + 1] for x in predictions))
        (expected,) = postprocess(alone, sizes[i : i + 1], 7)
        assert torch.equal(instances.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(instances.scores, expected.scores)


def test_predictions_are_left_as_they_were(predictions):
    before = [x.clone() for x in predictions]
    postprocess(predictions, [(100, 200)], 4)
    assert all(torch.equal(a, b) for a, b in zip(predictions, before, strict=True))


def test_nms_keeps_the_best_of_each_class_and_image():
    # Boxes 0 and 1 overlap by 0.8 (widths 10 and 8 of one left upper corner), box 2 is elsewhere.
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 8, 10], [20, 20, 30, 30.0]]).expand(2, 3, 4) / 40
    labels = torch.tensor([[1, 1, 1], [0, 1, 1]])  # in the second image they are of two classes
    detections = Detections(boxes, torch.tensor([[0.9, 0.8, 0.7]] * 2), labels)
    kept = non_maximum_suppression(detections, 0.79)
    assert kept.tolist() == [[True, False, True], [True, True, True]]
    assert non_maximum_suppression(detections, 0.81).all()


def test_nms_is_torchvisions_of_each_image():
    boxes = torch.rand(3, 200, 4, generator=torch.Generator().manual_seed(0))
    corners = torch.cat([boxes[..., :2] / 2, boxes[..., :2] / 2 + boxes[..., 2:] / 2], -1)
    scores = torch.rand(3, 200, generator=torch.Generator().manual_seed(1))
    labels = (scores * 1e4).long() % 5
    kept = non_maximum_suppression(Detections(corners, scores, labels), 0.3)
    assert 0.1 < kept.float().mean() < 0.9
    for image, found in zip(zip(corners, scores, labels, strict=True), kept, strict=True):
        expected = batched_nms(*image, 0.3)
        assert sorted(found.nonzero()[:, 0].tolist()) == sorted(expected.tolist())
