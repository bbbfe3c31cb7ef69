"""Training samples in an order that can be resumed anywhere."""

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
    """A seed derived from numbers >= 0, such as a training's seed and an iteration.

    Equal numbers give equal seeds; different ones give unrelated seeds.
    """
    # With their count, as SeedSequence ignores trailing zeros.
    return int(np.random.SeedSequence((len(what), *what)).generate_state(1)[0])


class TrainingStream:
    """Batches of Detectron2's training loader that depend only on a seed and their place.

    The order is that of Detectron2's sampler. Before an image is loaded and augmented, the random
    number generators are seeded with its place in the training. So a resumed training sees the same
    images and augmentations as one that never stopped, and the number of loader processes or
    workers does not change a step.

    Loaders with aspect ratio grouping restart on a resume, as their partly filled groups are
    unknown. So do loaders that are not Detectron2's.

    Args:
        build: makes the loader with detectron2's `build_detection_train_loader`
        seed: of order and augmentation, the same on every worker
    """

    def __init__(self, build: Callable[[], Any], seed: int):
        self.build, self.seed = build, seed
        self.start = 0  # batches to skip

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
                "the order of the training data restarts: only Detectron2's loaders without aspect "
                "ratio grouping can be resumed"
            )
        return iter(loader)


class Places(Sampler):
    """The indices of a Detectron2 sampler, combined with their place in the training.

    Yields place * size + index, as Detectron2 accepts only one number.

    Args:
        sampler: yields this worker's share of the indices
        start: indices to skip
        size: of the data set
    """

    def __init__(self, sampler: Sampler, start: int, size: int):
        self.sampler, self.start, self.size = sampler, start, size
        self.rank, self.workers = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        for number, index in enumerate(islice(self.sampler, self.start, None), self.start):
            yield (number * self.workers + self.rank) * self.size + index


class SeededDataset(Dataset):
    """A data set that seeds random numbers with a sample's place before loading it."""

    def __init__(self, dataset: Sequence[Any], seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, place_and_index: int) -> Any:
        place, index = divmod(place_and_index, len(self.dataset))
        seed_all_rng(seed_for(self.seed, place))
        return self.dataset[index]
