"""Training samples in an order that can be taken up anywhere."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from detectron2.data.common import ToIterableDataset
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.utils.data import DataLoader, Dataset, Sampler

logger = logging.getLogger(__name__)


def seed_for(*what: int) -> int:
    """A seed for what the numbers (>= 0) name, such as a training's own seed and an iteration.

    Seeds of numbers that differ are unrelated, and always the same for the same numbers.
    """
    # with their count, as trailing zeros make no difference
    return int(np.random.SeedSequence((len(what), *what)).generate_state(1)[0])


class TrainingStream:
    """Batches of Detectron2's training loader, each a function of a seed and its place alone.

    Detectron2's sampler says the order. Before an image is loaded and augmented, the generators of
    random numbers are seeded with its place in the training. So a training that is resumed gets the
    images, and sees them augmented, as if it had never stopped; and neither the number of loading
    processes nor that of workers changes what a step is made of.

    Loaders with aspect ratio grouping begin anew where they are taken up: which images wait for
    another of their kind is not known. So do loaders that are not Detectron2's.

    Args:
        build: makes the loader, with detectron2's `build_detection_train_loader`
        seed: of the order and the augmentation, the same on every worker
    """

    def __init__(self, build: Callable[[], Any], seed: int):
        self.build, self.seed = build, seed
        self.start = 0  # batches that have been seen

    def __iter__(self) -> Iterator[list[dict]]:
        seed_all_rng(seed_for(self.seed))  # Detectron2's samplers draw their seed from these
        loader = self.build()
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, ToIterableDataset):
            samples = loader.dataset
            size, seen = len(samples.dataset), self.start * (loader.batch_size or 1)
            samples.sampler = Places(samples.sampler, seen, size)
            samples.dataset = SeededDataset(samples.dataset, self.seed)
        elif self.start:
            seed_all_rng(seed_for(self.seed, 0, self.start))  # not the same images once more
            loader = self.build()
            logger.warning(
                "the training data are not taken up where they were left: only loaders of "
                "Detectron2 without aspect ratio grouping can be"
            )
        return iter(loader)


class Places(Sampler):
    """What a sampler of Detectron2 yields from an element on, with its place in the training.

    Args:
        sampler: of this worker's share of the indices
        start: elements to leave out
        size: of the data set

    Yields:
        place * size + index: Detectron2 takes nothing but a number
    """

    def __init__(self, sampler: Sampler, start: int, size: int):
        self.sampler, self.start, self.size = sampler, start, size
        self.rank, self.workers = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        for number, index in enumerate(islice(self.sampler, self.start, None), self.start):
            yield (number * self.workers + self.rank) * self.size + index


class SeededDataset(Dataset):
    """A data set whose samples are loaded with random numbers that belong to their place."""

    def __init__(self, dataset: Sequence[Any], seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, place_and_index: int) -> Any:
        place, index = divmod(place_and_index, len(self.dataset))
        seed_all_rng(seed_for(self.seed, place))
        return self.dataset[index]
