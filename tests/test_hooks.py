"""Hooks beside Detectron2's."""

import copy
import logging
import math

import pytest
from detectron2.engine import TrainerBase

from dino_d2.engine.hooks import BestCheckpointer, EarlyStop, EvalHook, ThresholdSaver


class Saver:
    """Remembers when it was told to save what."""

    def __init__(self):
        self.saved = []

    def save(self, name, iteration):
        self.saved.append((name, iteration))


class Loop(TrainerBase):
    def run_step(self):
        pass


def train(scores, *, period=1, start=0, stop=None, best=None, metric="bbox/AP", patience=0):
    """A training whose evaluations give `scores`, and the hook after it."""
    results = iter(scores)
    hook = BestCheckpointer(period, Saver(), metric, patience)
    if best:
        hook.load_state_dict(copy.deepcopy(best.state_dict()))
    loop = Loop()
    loop.register_hooks([EvalHook(period, lambda: {"bbox": {"AP": next(results)}}), hook])
    loop.train(start, stop or period * len(scores))
    return hook


def test_the_best_evaluation_is_kept():
    assert train([1.0, 3.0, 2.0, 4.0]).checkpointer.saved == [
        ("model_best", iteration) for iteration in (0, 1, 3)
    ]


def test_only_evaluations_are_looked_at():
    assert train([1.0, 2.0], period=3).checkpointer.saved == [("model_best", 2), ("model_best", 5)]


def test_as_good_is_not_better():
    assert len(train([1.0, 1.0]).checkpointer.saved) == 1


def test_no_number_is_never_the_best():
    assert [x for _, x in train([math.nan, 1.0, math.nan]).checkpointer.saved] == [1]


def test_a_training_without_periodic_evaluation_keeps_its_end():
    assert train([5.0], period=0, stop=3).checkpointer.saved == [("model_best", 2)]


def test_what_was_best_is_known_when_a_training_goes_on():
    first = train([3.0, 1.0])
    again = train([1.0, 2.0, 4.0], start=2, stop=4, best=first)
    assert [x for _, x in again.checkpointer.saved] == [3]


def test_the_evaluation_of_what_a_training_goes_on_from_is_made_up_for():
    """It is saved before it is evaluated, and may have been stopped in between."""
    hook = train([7.0, 6.0], period=3, start=3, stop=6)
    assert hook.checkpointer.saved == [("model_best", 2)] and hook.best == 7


def test_patience_ends_a_training_that_gets_no_better(caplog):
    scores = [math.nan, math.nan, 1.0, 3.0, 3.0, math.nan, 4.0]  # the first two say nothing
    with pytest.raises(EarlyStop, match="2 evaluations in a row had no better bbox/AP than 3.00"):
        train(scores, patience=2)
    assert "Exception" not in caplog.text  # Detectron2's loop logs errors
    assert train([3.0, 2.0, 4.0, 2.0, 5.0], patience=2).best == 5


def test_patience_is_counted_through_a_resume():
    first = train([3.0, 1.0], patience=2)
    with pytest.raises(EarlyStop):
        train([2.0, 4.0], start=2, stop=4, best=first, patience=2)


def test_the_end_of_a_training_is_no_early_stop():
    assert train([3.0, 1.0, 2.0], patience=2).worse == 2


class Checkpoints(Saver):
    def add_thresholds(self, iteration, thresholds):
        self.saved.append((thresholds, iteration))


def test_thresholds_of_an_evaluation_are_saved_with_its_weights():
    found = iter([0.1, 0.2])

    def evaluate():
        one = {"F1": {"threshold": next(found), "threshold-a/b": 0.5}}
        return {"x": one, "y": {"F1": {"threshold": 0.9}}, "ema": {"x": {"F1": {"threshold": 0.3}}}}

    loop, checkpointer = Loop(), Checkpoints()
    loop.register_hooks([EvalHook(2, evaluate), ThresholdSaver(2, checkpointer, "x/")])
    loop.train(0, 4)
    average = {"": 0.3}
    assert checkpointer.saved == [
        ({"thresholds": {"": x, "a/b": 0.5}, "ema_thresholds": average}, iteration)
        for x, iteration in ((0.1, 1), (0.2, 3))
    ]


def test_what_was_best_by_another_metric_says_nothing():
    first = train([3.0])
    other = BestCheckpointer(1, Saver(), "ema/bbox/AP")
    other.load_state_dict(first.state_dict())
    assert other.best == -math.inf


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (2, 3), (4, 5), (6, 6)])
def test_no_other_evaluation_is_made_up_for(start, stop):
    hook = train([5.0], period=3, start=start, stop=stop)
    assert len(hook.checkpointer.saved) == 1  # that of its end


@pytest.mark.parametrize("failing", [0, 4])
def test_a_training_that_fails_is_not_evaluated(failing):
    """Not in its last step either."""

    class Failing(Loop):
        def run_step(self):
            if self.iter == failing:
                raise FloatingPointError

    evaluations = []
    hook = BestCheckpointer(0, Saver(), "bbox/AP")
    loop = Failing()
    loop.register_hooks([EvalHook(0, lambda: evaluations.append(1)), hook])
    with pytest.raises(FloatingPointError):
        loop.train(0, 5)
    assert not evaluations and not hook.checkpointer.saved


def test_a_metric_that_there_is_not_is_said(caplog):
    with caplog.at_level(logging.WARNING, "dino_d2"):
        hook = train([1.0], metric="bbox/APP")
    assert not hook.checkpointer.saved and "bbox/APP" in caplog.text
