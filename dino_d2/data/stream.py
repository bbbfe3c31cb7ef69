"""Training samples in an order that can be resumed anywhere."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from detectron2.data import build_detection_train_loader
from detectron2.data.common import ToIterableDataset
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.utils.data import DataLoader, Dataset, Sampler

from .mixing import Mixing

logger = logging.getLogger(__name__)


def seed_for(*what: int) -> int:
    """A seed derived from numbers >= 0, such as the seed of a run and an iteration.

    Equal numbers give equal seeds; different ones give unrelated seeds.
    """
    # With their count, as SeedSequence ignores trailing zeros.
    return int(np.random.SeedSequence((len(what), *what)).generate_state(1)[0])


def build_train_loader(
    dataset: Any, *, aspect_ratio_grouping: bool = False, **options: Any
) -> DataLoader:
    """Detectron2's `build_detection_train_loader`, whose batches are by default of any images.

    A LazyConfig with it has only what `tools/benchmark.py` of Detectron2 takes too.
    """
    return build_detection_train_loader(
        dataset, aspect_ratio_grouping=aspect_ratio_grouping, **options
    )


class TrainingStream:
    """Batches of Detectron2's training loader that depend only on a seed and their place.

    The order is that of Detectron2's sampler. Before an image is loaded and augmented, the random
    number generators are seeded with its position in the run. So a resumed run sees the same images
    and augmentations as an uninterrupted one, and the number of loader processes or workers does
    not change a step.

    Loaders with aspect ratio grouping restart on a resume, as their partly filled groups are
    unknown. So do loaders that are not Detectron2's.

    Args:
        build: makes the loader with detectron2's `build_detection_train_loader`
        seed: of order and augmentation, the same on every worker
        mixing: combines images, or None
        mixed: the positions in the run of the images that it combines

    Raises:
        ValueError: images are to be mixed, but their places are unknown, see `require_places`
    """

    def __init__(
        self,
        build: Callable[[], Any],
        seed: int,
        mixing: Mixing | None = None,
        mixed: range = range(0),
    ):
        self.build, self.seed = build, seed
        self.mixing, self.mixed = mixing, mixed
        self.start = 0  # batches to skip

    def __iter__(self) -> Iterator[list[dict]]:
        seed_all_rng(seed_for(self.seed))  # Detectron2's samplers draw their seed from these
        loader = self.build()
        if self.mixing:
            require_places(loader)
        if has_places(loader):
            samples = loader.dataset
            size, seen = len(samples.dataset), self.start * (loader.batch_size or 1)
            samples.sampler = Places(samples.sampler, seen, size)
            samples.dataset = SeededDataset(samples.dataset, self.seed, self.mixing, self.mixed)
        elif self.start:
            seed_all_rng(seed_for(self.seed, 0, self.start))  # not the same images once more
            loader = self.build()
            logger.warning(
                "the order of the training data restarts: only Detectron2's loaders without aspect "
                "ratio grouping can be resumed"
            )
        return iter(loader)


def has_places(loader: Any) -> bool:
    """Whether the position of each image in the run is known, as with Detectron2's loaders."""
    return isinstance(loader, DataLoader) and isinstance(loader.dataset, ToIterableDataset)


def require_places(loader: Any) -> None:
    """Raise a ValueError for a loader that cannot mix images, as their places are unknown."""
    if not has_places(loader):
        raise ValueError(
            "mosaic and mixup need Detectron2's loader over a list of images, without aspect ratio "
            "grouping: set DATALOADER.ASPECT_RATIO_GROUPING False "
            "(dataloader.train.aspect_ratio_grouping)"
        )


class Places(Sampler):
    """The indices of a Detectron2 sampler, combined with their position in the run.

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
    """A data set that seeds random numbers with a sample's place before loading it.

    At the places in `mixed`, it is mixed with others.
    """

    def __init__(self, dataset: Sequence[Any], seed: int, mixing: Mixing | None, mixed: range):
        self.dataset, self.seed = dataset, seed
        self.mixing, self.mixed = mixing, mixed

    def __getitem__(self, place_and_index: int) -> Any:
        place, index = divmod(place_and_index, len(self.dataset))
        seed_all_rng(seed_for(self.seed, place))
        if self.mixing and place in self.mixed:
            return self.mixing(self.dataset, index)
        return self.dataset[index]
