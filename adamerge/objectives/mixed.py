"""A weighted sum of objectives."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from adamerge.errors import InputError
from adamerge.objectives.base import Logits, Loss, Objective


class Mixed(Objective):
    """Sum of objectives, each on the logits it reads.

    It reads predictions, and a router's logits beside them where a part needs those; where all parts read
    the router, so does the sum.

    Args:
        parts: Objectives; at most one that remembers its tasks.
        weights: Factor of each part; default: 1.

    Raises:
        InputError: There are no parts, a part is a sum itself or a second one remembers tasks, or the
            weights are not finite or not as many.
    """

    def __init__(self, parts: list[Objective], weights: list[float] | None = None) -> None:
        super().__init__()
        if not parts or any(isinstance(part, Mixed) for part in parts):
            raise InputError("Mixed needs a flat list of objectives.", "List all parts in one `parts`.")
        weights = [1.0] * len(parts) if weights is None else weights
        if len(weights) != len(parts) or not all(map(math.isfinite, weights)):
            raise InputError(f"weights={weights} are not {len(parts)} finite numbers.", "Give one per part.")
        memory = [type(part).per_task_state is not Objective.per_task_state for part in parts]
        if sum(memory) > 1:
            raise InputError("two parts of Mixed remember their tasks.", "Use at most one ReliableEntropy.")
        self._parts, self.weights = nn.ModuleList(parts), weights
        self.needs_teacher = any(part.needs_teacher for part in parts)
        self.reads = "routing" if all(part.reads == "routing" for part in parts) else "prediction"

    @property
    def parts(self) -> list[Objective]:
        """The objectives, in order."""
        return [part for part in self._parts if isinstance(part, Objective)]

    @property
    def needs_router(self) -> bool:
        """Whether a part reads the router's logits."""
        return any(part.needs_router for part in self.parts)

    def build(self, tasks: Sequence[str]) -> None:
        """Let the parts meet the tasks."""
        for part in self.parts:
            part.build(tasks)

    def forward(
        self,
        logits: Logits,
        task: str,
        teacher: Logits | None = None,
        routing: Float[Tensor, "image task"] | None = None,
    ) -> Loss | None:
        """Give the weighted sum of the parts that are worth a step, or None where none is.

        Args:
            logits: What the sum reads: predictions, or the router's logits.
            task: Whose images these are.
            teacher: The expert's logits, ``[image, class]``.
            routing: The router's logits, ``[image, task]``, beside predictions.

        Raises:
            InputError: A part reads the router, and there is none.
        """
        if self.reads == "routing":
            routing = logits
        terms = []
        for part, weight in zip(self.parts, self.weights, strict=True):
            if part.needs_router and routing is None:
                raise InputError(f"{type(part).__name__} needs a router, found static coefficients.")
            loss = part(routing, task) if part.needs_router else part(logits, task, teacher)
            if loss is not None:
                terms.append(weight * loss)
        return sum(terms[1:], terms[0]) if terms else None

    def begin_step(self) -> None:
        """Let the parts forget the last step."""
        for part in self.parts:
            part.begin_step()

    def recovery_due(self) -> bool:
        """Tell, once, whether a part asks for the initial coefficients."""
        due = [part.recovery_due() for part in self.parts]  # all are asked: each tells once
        return any(due)

    def forget(self) -> None:
        """Let the parts forget all tasks."""
        for part in self.parts:
            part.forget()

    def per_task_state(self) -> dict[str, float]:
        """Give what the part with a memory remembers."""
        return {task: value for part in self.parts for task, value in part.per_task_state().items()}

    def load_per_task_state(self, state: dict[str, float]) -> None:
        """Take it back."""
        for part in self.parts:
            part.load_per_task_state(state)
