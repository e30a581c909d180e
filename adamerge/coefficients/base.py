"""What any source of merging coefficients offers to the trainer: static ones, and ones per input."""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adamerge.coefficients.grouping import GROUPINGS
from adamerge.errors import InputError
from adamerge.ranges import checked

Reads = Literal["input", "block", "token", "task"]


class Coefficients(nn.Module, ABC):
    """Merging coefficients that an optimizer can change.

    They are configured first and meet their tasks later, in `build`. There are three kinds: static ones,
    with ``build(tasks, names)`` and ``forward() -> [task, tensor]``; finer ones, `adamerge.spaces.Space`,
    which meet the vectors and merge themselves; and one mixture per input, `Routing`.
    """

    @abstractmethod
    def build(self, tasks: Sequence[str], what: Any, /) -> None:
        """Create the parameters for these tasks, and tensor names (static) or feature sizes (`Routing`)."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Give coefficients, differentiable in the parameters."""

    @abstractmethod
    def reset(self) -> None:
        """Go back to the initial values, in place."""

    def after_step(self) -> None:
        """Repair the parameters after an optimizer step, where their space asks for it."""

    def settled(self) -> Iterable[nn.Parameter]:
        """Give the parameters that are not to move any more."""
        return ()

    @abstractmethod
    def table(self) -> tuple[list[str], Float[Tensor, "task group"]]:
        """Give the groups' labels and the effective coefficients, for reports."""


class Routing(Coefficients):
    """Coefficients per input: how much of each expert's exclusive part a sample gets.

    Args:
        groups: Pattern of the tensors that are routed (`re.search`, e.g. "mlp"); the others keep the
            shared model's values. None: all tensors.

    Attributes:
        reads: What the weights depend on: "input": the shared model's pooled feature of the sample;
            "block": the mean over tokens of what a block reads; "token": each token at each matrix;
            "task": the true task.

    Raises:
        InputError: ``groups`` is no regular expression.
    """

    reads: Reads = "input"

    @checked
    def __init__(self, groups: str | None = None) -> None:
        super().__init__()
        try:
            self._routed = re.compile(groups or "")
        except re.error as error:
            raise InputError(f"groups={groups!r} is no regular expression: {error}.") from error
        self.groups = groups
        self.tasks: tuple[str, ...] = ()

    def group_of(self, name: str) -> str | None:
        """Give the label of the tensors that share a gate with this one, or None where it is not routed.

        One label, "", for all tensors, except where the weights read blocks: then the block's, and
        tensors outside blocks are not routed.
        """
        if not self._routed.search(name):
            return None
        if self.reads != "block":
            return ""
        label = GROUPINGS["block"](name)
        return label if re.search(r"\.\d+$", label) else None

    def build(self, tasks: Sequence[str], sizes: Mapping[str, int], /) -> None:
        """Create the parameters for these tasks; ``sizes`` is the feature dimension of each group."""
        self.tasks = tuple(tasks)

    @abstractmethod
    def logits(self, features: Tensor, group: str = "") -> Float[Tensor, "*sample task"]:
        """Give the scores that the weights are selected by, in fp32."""

    def select_from(self, logits: Float[Tensor, "*sample task"]) -> Float[Tensor, "*sample task"]:
        """Turn scores into weights; by default they are the weights."""
        return logits

    def forward(self, features: Tensor, group: str = "") -> Float[Tensor, "*sample task"]:
        """Give each sample's weights of the experts, in fp32.

        Args:
            features: What the weights depend on: ``[sample, dim]`` for "input" and "block"; projections'
                lengths ``[*sample, task]`` for "token"; indices of tasks ``[sample]`` for "task".
            group: A label that `group_of` gave.
        """
        return self.select_from(self.logits(features, group))

    def options(self) -> dict[str, Any]:
        """Give the constructor's arguments, each kept under its name, to make the same routing again."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def reset(self) -> None:
        """Go back to the initial values, in place."""

    def table(self) -> tuple[list[str], Float[Tensor, "task group"]]:
        """Give labels of groups and weights that hold for every input; without parameters there are none."""
        return [], torch.zeros(len(self.tasks), 0)
