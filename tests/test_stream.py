"""Training data that can be taken up anywhere."""

import logging
import random

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler

from dino_d2.data import stream
from dino_d2.data.stream import TrainingStream, seed_for

SIZE, BATCH = 7, 2


def draw(record):
    """A mapper that says which record it got, and what three generators drew for it."""
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    return record | {"drawn": drawn}


def records():
    return [{"index": i, "height": 4 + i % 2, "width": 5} for i in range(SIZE)]


def loader(**options):
    settings = {"mapper": draw, "total_batch_size": BATCH, "aspect_ratio_grouping": False}
    return build_detection_train_loader(records(), **(settings | options))


def mix(dataset, index):
    """A mixing that takes a second image, and says which."""
    return dataset[index] | {"other": dataset[np.random.randint(SIZE)]["index"]}


def take(count, *, seed=3, start=0, build=loader, mixed=range(0)):
    training = TrainingStream(build, seed, mix if mixed else None, mixed)
    training.start = start
    batches = iter(training)
    taken = [next(batches) for _ in range(count)]
    return [[(x["index"], x["drawn"], *others(x)) for x in batch] for batch in taken]


def others(sample):
    return [sample["other"]] if "other" in sample else []


@pytest.mark.parametrize("start", [1, 4, 9])
def test_a_stream_that_is_taken_up_yields_what_it_would_have(start):
    assert take(3, start=start) == take(start + 3)[start:]


def test_an_epoch_has_every_image_once_and_the_next_has_another_order():
    indices = [index for batch in take(SIZE) for index, *_ in batch]
    epochs = indices[:SIZE], indices[SIZE:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(SIZE))
    assert epochs[0] != epochs[1]


def test_every_place_draws_anew():
    drawn = [drawn for batch in take(2 * SIZE) for _, drawn in batch]
    for values in zip(*drawn, strict=True):
        assert len(set(values)) == len(drawn)


def test_the_seed_changes_order_and_augmentation():
    first, second = take(4, seed=3), take(4, seed=4)
    assert [[x[0] for x in batch] for batch in first] != [[x[0] for x in batch] for batch in second]
    drawn = [{x[1] for batch in batches for x in batch} for batches in (first, second)]
    assert not drawn[0] & drawn[1]


def test_what_was_drawn_elsewhere_before_changes_nothing():
    expected = take(3)
    for generators in (np.random.seed, torch.manual_seed, random.seed):
        generators(99)
    assert take(3) == expected


# Steps 2 to 4 of two images.
MIXED = range(4, 10)


def test_images_are_mixed_at_their_places_alone():
    plain, mixed = take(7), take(7, mixed=MIXED)
    for step in range(7):
        is_mixed = 2 <= step < 5
        assert [len(x) for x in mixed[step]] == [3 if is_mixed else 2] * 2
        # the first image is the one that would be there, augmented alike
        assert [x[:2] for x in mixed[step]] == plain[step]
    partners = [x[2] for step in mixed[2:5] for x in step]
    assert len(set(partners)) > 2 and set(partners) <= set(range(SIZE))


def test_mixed_images_can_be_taken_up_anywhere():
    whole = take(7, mixed=MIXED)
    for start in range(1, 6):
        assert take(2, start=start, mixed=MIXED) == whole[start : start + 2]


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 3])
def test_the_number_of_loading_processes_changes_nothing(start):
    expected = take(5, start=start, mixed=MIXED)
    for number in (2, 3):
        found = take(5, start=start, mixed=MIXED, build=lambda n=number: loader(num_workers=n))
        assert found == expected


def test_the_number_of_workers_changes_nothing(monkeypatch):
    alone = take(4, start=2, mixed=MIXED)

    def worker(rank):
        for module in (stream.comm, __import__("detectron2.utils.comm", fromlist=["comm"])):
            monkeypatch.setattr(module, "get_rank", lambda: rank)
            monkeypatch.setattr(module, "get_world_size", lambda: 2)
        monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: 2)
        monkeypatch.setattr(stream.comm, "all_gather", lambda x: [x, x])
        return take(4, start=2, mixed=MIXED)

    shares = [worker(rank) for rank in (0, 1)]
    for step, batch in enumerate(alone):
        assert sorted(shares[0][step] + shares[1][step]) == sorted(batch)


def test_detectron2s_other_samplers_are_taken_up_too():
    def build():
        factors = torch.tensor([1.0, 1.0, 2.5, 1.0, 1.0, 1.5, 1.0])
        return loader(sampler=RepeatFactorTrainingSampler(factors))

    expected = take(12, build=build)
    assert take(4, start=8, build=build) == expected[8:]
    assert take(12, build=build, seed=4) != expected


def test_loaders_that_cannot_be_taken_up_say_so(caplog):
    def build():
        return loader(aspect_ratio_grouping=True)

    with caplog.at_level(logging.WARNING, "dino_d2"):
        take(2, build=build)
        assert not caplog.records
        take(2, start=1, build=build)
    assert "aspect ratio grouping" in caplog.text


def test_loaders_that_do_not_know_places_cannot_mix_images():
    with pytest.raises(ValueError, match="mosaic and mixup need .*ASPECT_RATIO_GROUPING False"):
        take(1, build=lambda: loader(aspect_ratio_grouping=True), mixed=MIXED)


def test_seeds_are_seeds_and_differ():
    seeds = {seed_for(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**32 for seed in seeds)
    assert seed_for(1, 2) == seed_for(1, 2) and seed_for(1) not in seeds
