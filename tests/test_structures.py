import pytest
import torch

from dino_d2.structures import (
    Predictions,
    Queries,
    join_queries,
    join_targets,
    send_to_device,
    split_predictions,
    stack_predictions,
)


def test_queries_are_joined_in_the_given_order():
    first = Queries(torch.full((2, 3, 8), 1.0), torch.full((2, 3, 4), 0.1))
    second = Queries(torch.full((2, 5, 8), 2.0), torch.full((2, 5, 4), 0.2))
    both = join_queries([first, second])
    assert both.content[0, :, 0].tolist() == [1.0] * 3 + [2.0] * 5
    torch.testing.assert_close(both.reference[1, :, 3], torch.tensor([0.1] * 3 + [0.2] * 5))


@pytest.mark.parametrize(
    "second",
    [
        Queries(torch.zeros(2, 5, 8), torch.zeros(2, 5, 2)),
        Queries(torch.zeros(2, 5, 8), torch.zeros(2, 5, 4), torch.zeros(2, 5, 8)),
    ],
    ids=["points", "learned positions"],
)
def test_queries_of_boxes_are_not_joined_with_those_of_points(second):
    first = Queries(torch.zeros(2, 3, 8), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="need queries with boxes, but those"):
        join_queries([first, second])


@pytest.mark.parametrize("index", [0, 2, 5])
def test_split_predictions_are_the_front_and_the_rest(make_predictions, index):
    whole = make_predictions(2)
    front, back = split_predictions(whole, [index, 5 - index])
    assert front.logits.shape[1] == front.boxes.shape[1] == index
    for a, b, both in zip(front, back, whole, strict=True):
        assert torch.equal(torch.cat([a, b], 1), both)


def test_stacked_stages_have_a_leading_axis(make_predictions):
    stages = [make_predictions(2) for _ in range(3)]
    stacked = stack_predictions(stages)
    assert stacked.logits.shape == (3, 2, 5, 3) and stacked.boxes.shape == (3, 2, 5, 4)
    assert torch.equal(stacked.logits[1], stages[1].logits)
    assert torch.equal(stacked.boxes[2], stages[2].boxes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_stacked_logits_are_never_narrower_than_float32(given, expected):
    stage = Predictions(torch.zeros(1, 2, 3, dtype=given), torch.zeros(1, 2, 4))
    assert stack_predictions([stage]).logits.dtype == expected


def test_joined_targets_are_those_of_the_images_one_after_the_other(make_targets):
    targets = make_targets(2, 0, 3)
    joined = join_targets(targets)
    assert torch.equal(joined.labels[2:], targets[2].labels)
    assert torch.equal(joined.boxes[:2], targets[0].boxes)
    assert joined.boxes.shape == (5, 4)


def test_what_is_sent_is_on_the_device_of_the_other_and_keeps_its_type(device):
    x = torch.arange(3)
    sent = send_to_device(x, like=torch.zeros(2, device=device))
    assert sent.device.type == device.type
    assert torch.equal(sent.cpu(), x) and sent.dtype == x.dtype
