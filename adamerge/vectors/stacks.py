"""Stacks: the vectors of a whole model as a stream that can be walked repeatedly."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.progress import track
from adamerge.vectors.block import Block
from adamerge.vectors.dense import DenseBlock
from adamerge.vectors.streamed import EditedBlock, read_ahead

Edit = Callable[[str, Tensor], Tensor]


class Stacks(Iterable[tuple[str, Tensor]]):
    """The fp32 task vectors of every parameter, ``(name, [task, *param])``.

    Each walk reads (or expands) one parameter at a time; of vectors that stay in their files, the next
    parameter is read from disk meanwhile.

    Args:
        blocks: Parameter name to block.
        description: What a walk is for, on the progress bar.
    """

    def __init__(self, blocks: Mapping[str, Block], description: str = "Reading task vectors") -> None:
        self.blocks, self.description = blocks, description

    @classmethod
    def of(cls, stacks: Mapping[str, Tensor]) -> "Stacks":
        """Give the stream of vectors in memory, ``[task, *param]`` by name."""
        return cls({name: DenseBlock(torch.zeros(stack.shape[1:]), stack) for name, stack in stacks.items()})

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, block in self.walk():
            yield name, block.dense()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, without the task axis; nothing is read."""
        return {name: block.shape[1:] for name, block in self.blocks.items()}

    @property
    def n_tasks(self) -> int:
        """Number of experts."""
        return next(iter(self.blocks.values())).shape[0]

    def pieces(self) -> Iterator[tuple[str, Float[Tensor, "task entry"]]]:
        """Walk all entries of the model in pieces that fit a cache; a piece lives until the next one."""
        for name, block in self.walk():
            for _, piece in block.pieces():
                yield name, piece

    def map(self, edit: Edit, *, entrywise: bool) -> "Stacks":
        """Give the stream under an edit, which is applied anew in every walk.

        Args:
            edit: From a parameter's name and fp32 vectors to vectors of the same shape.
            entrywise: Whether every entry is treated on its own (pieces ``[task, entry]`` are given).
        """
        return Stacks(edited(self.blocks, edit, entrywise=entrywise), self.description)

    def walk(self) -> Iterator[tuple[str, Block]]:
        """Yield name and block, under a progress bar in which every entry counts the same."""
        sizes = [torch.Size(block.shape).numel() for block in self.blocks.values()]
        yield from track(read_ahead(self.blocks.items()), self.description, sizes)


def edited(blocks: Mapping[str, Block], edit: Edit, *, entrywise: bool) -> dict[str, Block]:
    """Put every block under an edit."""

    def bind(name: str) -> Callable[[Tensor], Tensor]:
        return lambda vectors: edit(name, vectors)

    return {name: EditedBlock(block, bind(name), entrywise) for name, block in blocks.items()}
