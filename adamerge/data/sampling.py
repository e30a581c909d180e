"""Batches that are a pure function of (seed, task, step), which makes resuming bit-identical."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """Yields the image indices of step ``first_step``, ``first_step + 1``, ... without end.

    Images come in a new random order every epoch, or as they are; a batch may span two epochs, so a data
    set smaller than a batch is simply walked more than once.

    Args:
        n_images: Size of the data set.
        batch_size: Images per step.
        seed: Seed of the run.
        task: Name of the task, which gives each task an order of its own.
        first_step: Where to begin.
        shuffle: Whether each epoch has an order of its own; otherwise all walk the images as they are.
    """

    def __init__(
        self,
        n_images: int,
        batch_size: int,
        *,
        seed: int,
        task: str,
        first_step: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.n_images, self.batch_size, self.first_step = n_images, batch_size, first_step
        self.shuffle = shuffle
        self._key = f"{seed}/{task}"

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> list[int]:
        """Give the indices of one step."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {epoch: self._order(epoch) for epoch in {p // self.n_images for p in positions}}
        return [orders[p // self.n_images][p % self.n_images] for p in positions]

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(self.n_images)
        seed = hashlib.sha256(f"{self._key}/{epoch}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        return torch.randperm(self.n_images, generator=generator).tolist()
