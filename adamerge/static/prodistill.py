"""ProDistill: a coefficient for every entry, block after block, by distillation from the experts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from adamerge.errors import InputError, NumericError
from adamerge.progress import track
from adamerge.ranges import Seed
from adamerge.state import State
from adamerge.static.registry import static_method
from adamerge.vectors import Stacks


@runtime_checkable
class Blocks(Protocol):
    """A model's blocks, as `adamerge.models.blockwise.Blocks` gives them."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of the vectors."""
        ...

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        ...

    def units(self) -> Sequence[Any]:
        """Give the blocks in the order of the forward pass."""
        ...

    def calls(self, unit: Any, task: str, merged: State, shots: int) -> Iterable[Any]:
        """Walk what a block is given on a task's images."""
        ...

    def expert(self, unit: Any, task: str) -> dict[str, Tensor]:
        """Give a block's tensors as a task's own expert has them."""
        ...

    def run(self, unit: Any, weights: State, call: Any) -> list[Tensor]:
        """Give what a block returns under given weights."""
        ...


Pair = tuple[Any, list[Tensor]]  # what the merged unit is given, and what the expert's unit makes of its own


@static_method(
    title="Scalable Model Merging with Progressive Layer-wise Distillation (ProDistill)",
    source="arXiv:2502.12706",
    scope="model",
    needs=("blocks", "name"),
    grain="tensor",
)
def prodistill(
    stacks: Stacks,
    *,
    blocks: Blocks,
    initial: float = 0.3,
    lr: float = 0.01,
    epochs: int = 100,
    shots: int = 64,
    seed: Seed = 0,
) -> Callable[..., Tensor]:
    """Fit, block after block, what the merged block makes of the merged stream to the experts' outputs.

    Each task has two streams of the same unlabelled images: through its expert, and through the merged
    blocks so far. A block's coefficients, one per task and entry, minimise the sum over tasks of the mean
    squared difference of the merged block's output on the one from the expert block's on the other. One
    step of Adam takes one batch of every task. Stem and last norm are fitted like blocks; parameters that
    no module call shows (class token, positions, CLIP's projection) and buffers have ``initial`` throughout.

    The coefficients, moments and vectors of one block, the streams before it and one merged model are in
    memory at once. On a CPU a model of 100 M parameters takes hours with the published number of epochs.

    Args:
        stacks: fp32 task vectors of the whole model.
        blocks: The model's blocks, with what they are given.
        initial: The coefficients' start.
        lr: Adam's learning rate.
        epochs: Walks over the images of each block.
        shots: Images per task, of those that are sampled.
        seed: Of the order of batches.

    Returns:
        The merge of a parameter's ``[task, *param]`` vectors.

    Raises:
        InputError: An option is out of its range, or the model has no blocks.
        NumericError: A block's loss is not finite.
    """
    if epochs < 0 or shots < 1 or not lr > 0:
        raise InputError(
            f"epochs={epochs} over shots={shots} images with lr={lr} leads nowhere.",
            "Use e.g. epochs=100, shots=64 and lr=0.01.",
        )
    units = blocks.units()
    merged = {name: initial * stack.sum(0) for name, stack in stacks}
    sizes = [sum(merged[n].numel() for n in unit.names if n in merged) for unit in units]
    for unit in track(units, "Distilling block by block", sizes):
        student = Student(stacks, unit.names, blocks.device, initial)
        if student.names:
            pairs, fixed = _pairs(stacks, blocks, unit, merged, shots)
            student.fit(
                lambda own, call, u=unit, f=fixed: blocks.run(u, {**f, **own}, call), pairs, lr, epochs, seed
            )
            merged |= student.vectors()
    return lambda _stack, *, name: merged[name]


class Student:
    """A block whose coefficients are learned: base + sum over tasks of coefficient * vector, by entry.

    Args:
        stacks: The vectors of the model.
        names: The block's parameters; those without vectors are left out.
        device: Where to compute.
        initial: The coefficients' start.
    """

    def __init__(self, stacks: Stacks, names: Iterable[str], device: torch.device, initial: float) -> None:
        known = {name: stacks.blocks[name] for name in names if name in stacks.blocks}
        self.base = {name: block.base_tensor().to(device, torch.float32) for name, block in known.items()}
        self.stacks = {name: block.dense().to(device) for name, block in known.items()}
        self.coefficients = {name: torch.full_like(stack, initial) for name, stack in self.stacks.items()}
        self.losses: list[float] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self.stacks)

    def vectors(self) -> dict[str, Tensor]:
        """Give the merged vectors, on the CPU."""
        return {n: (value * self.stacks[n]).sum(0).cpu() for n, value in self.coefficients.items()}

    def fit(
        self,
        run: Callable[[State, Any], list[Tensor]],
        pairs: list[list[Pair]],
        lr: float,
        epochs: int,
        seed: int,
    ) -> None:
        """Minimise the distance from the experts' outputs; each epoch's mean loss is kept.

        Args:
            run: Gives the block's outputs under weights.
            pairs: By task, batches.
            lr: Adam's learning rate.
            epochs: Walks over the batches.
            seed: Of their order.
        """
        generator, steps = torch.Generator().manual_seed(seed), max(map(len, pairs))
        optimizer = torch.optim.Adam([*self.coefficients.values()], lr=lr, fused=True)
        for _ in range(epochs):
            losses = []
            for index in torch.randperm(steps, generator=generator).tolist():
                losses.append(self._backward(run, [batches[index % len(batches)] for batches in pairs]))
                optimizer.step()
            self.losses.append(float(torch.stack(losses).mean()))
            if not torch.isfinite(torch.tensor(self.losses[-1])):
                raise NumericError(
                    f"the loss of the block of {self.names[0]} is {self.losses[-1]}.",
                    "Use a smaller lr, or coefficients nearer to 0: a variance may have become negative.",
                )

    @torch.enable_grad()
    def _backward(self, run: Callable[[State, Any], list[Tensor]], batch: list[Pair]) -> Float[Tensor, ""]:
        """Give the loss, and the coefficients their gradient: the weight's, times the vectors."""
        sums = {n: (value * self.stacks[n]).sum(0) for n, value in self.coefficients.items()}
        weights = {name: (self.base[name] + total).requires_grad_() for name, total in sums.items()}
        total = torch.zeros((), device=next(iter(weights.values())).device)
        for call, target in batch:  # one graph at a time
            losses = [mse_loss(a, b.to(a.device)) for a, b in zip(run(weights, call), target, strict=True)]
            loss = torch.stack(losses).sum()
            loss.backward()
            total += loss.detach()
        for name, weight in weights.items():
            if weight.grad is not None:
                self.coefficients[name].grad = weight.grad * self.stacks[name]
        return total


def _pairs(
    stacks: Stacks, blocks: Blocks, unit: Any, merged: Mapping[str, Tensor], shots: int
) -> tuple[list[list[Pair]], dict[str, Tensor]]:
    """Collect, by task and batch, what the merged unit is given, and what the expert's makes of its own.

    Returns:
        These, and the merged unit's tensors, learned or not.
    """
    weights, pairs = {n: stacks.blocks[n].base_tensor().float() + v for n, v in merged.items()}, []
    expert: dict[str, Tensor] = {}
    for task in blocks.tasks:
        expert = blocks.expert(unit, task)
        with torch.no_grad():
            given = blocks.calls(unit, task, {}, shots)
            targets = [[x.cpu() for x in blocks.run(unit, expert, call)] for call in given]
        pairs.append([*zip(blocks.calls(unit, task, weights, shots), targets, strict=True)])
    own = {name: weights[name].to(blocks.device) for name in expert if name in weights}
    return pairs, expert | own  # what has no vector, all experts share
