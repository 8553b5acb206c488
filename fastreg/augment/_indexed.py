"""A dataset whose samples know their index, so that what is drawn for one does not depend on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_count
from .._seeds import mixed_seed, seed_tensor

OP = "Indexed"


class IndexedSample(NamedTuple):
    """A sample, its index in the dataset, and the seed of the epoch."""

    sample: Any
    number: int
    seed: int
    dataset: int  # which `Indexed` it is of, among those of its process


class Indexed(torch.utils.data.Dataset):
    """Wrap a dataset, so that `Augment.collate` draws for a sample by its index and the epoch alone.

    ::

        train = fr.augment.Indexed(dataset, seed=0)
        loader = DataLoader(train, 64, sampler=DistributedSampler(train), collate_fn=augment.collate)
        for epoch in range(epochs):
            train.set_epoch(epoch)  # beside sampler.set_epoch(epoch)

    A sample is augmented alike on 1, 2 and 4 ranks, with any number of workers, in any batch and order, after
    a resumption too, and otherwise in each epoch. `mixup` and `cutmix`, which join samples of a batch, draw
    as they do without this.

    Args:
        dataset: with `__getitem__` and `__len__`, indices from 0.
        seed: an int64, the same on all ranks.

    The epoch is kept where workers see it, those of `persistent_workers=True` too.

    Raises:
        TypeError: a dataset without indices, a seed or an epoch that is no int.
        ValueError: a seed beyond 64 bits, an epoch below 0.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"{OP}: dataset must have __getitem__ and __len__, got {type(dataset).__name__}; an iterable "
                f"dataset has no indices"
            )
        self.dataset = dataset
        self._seed = seed_tensor(OP, seed)
        self._epoch = torch.zeros(1, dtype=torch.int64, device="cpu").share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Let the samples from now on be those of an epoch."""
        check_count(OP, "epoch", epoch, low=0)
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> IndexedSample:
        index = int(index)
        return self._numbered([self.dataset[index]], [index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[IndexedSample]:
        """The samples of a batch, at once where the dataset gives them so; DataLoader calls it."""
        at = [int(index) for index in indices]
        several = getattr(self.dataset, "__getitems__", None)
        return self._numbered([self.dataset[i] for i in at] if several is None else several(at), at)

    def _numbered(self, samples: Sequence[Any], at: list[int]) -> list[IndexedSample]:
        seed, length = int(mixed_seed(self._seed, self._epoch)), len(self)
        numbers = [i + length if i < 0 else i for i in at]
        return [IndexedSample(*pair, seed, id(self)) for pair in zip(samples, numbers, strict=True)]


def numbers_of(samples: list[Any]) -> tuple[list[Any], tuple[Tensor, Tensor] | None]:
    """(the samples themselves, (seed, index of each) where they are `Indexed`)."""
    if not samples or not all(isinstance(sample, IndexedSample) for sample in samples):
        return samples, None
    datasets = {sample.dataset for sample in samples}
    if len(datasets) > 1:
        raise ValueError(
            f"Augment.collate: the samples of a batch must be of one Indexed dataset, in which each index is "
            f"there once, got {len(datasets)}; wrap what joins them, Indexed(ConcatDataset([...]))"
        )
    seeds = {sample.seed for sample in samples}
    if len(seeds) > 1:
        raise ValueError(
            f"Augment.collate: the samples of a batch must be of one epoch, got {len(seeds)}; call set_epoch "
            f"between the epochs of a loader"
        )
    index = torch.tensor([sample.number for sample in samples], dtype=torch.int64, device="cpu")
    return [sample.sample for sample in samples], (seed_tensor(OP, seeds.pop()), index)
