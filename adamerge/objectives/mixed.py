"""A weighted sum of objectives."""

from collections.abc import Sequence

from torch import Tensor, nn

from adamerge.errors import InputError
from adamerge.objectives.base import Logits, Loss, Memory, Objective, Reads, Views
from adamerge.ranges import Coefficient, checked


class Mixed(Objective):
    """Sum of objectives, each of what it reads.

    Where all parts that read images read the same, so does the sum; otherwise it counts as one of
    predictions, and `loss` gives each part its own.

    Args:
        parts: Objectives.
        weights: Factor of each part; default: 1.

    Raises:
        InputError: There are no parts, a part is a sum itself, two parts augment images, or the weights
            are not finite or not as many.
    """

    @checked
    def __init__(self, parts: list[Objective], weights: list[Coefficient] | None = None) -> None:
        super().__init__()
        if not parts or any(isinstance(part, Mixed) for part in parts):
            raise InputError("Mixed needs a flat list of objectives.", "List all parts in one `parts`.")
        weights = [1.0] * len(parts) if weights is None else weights
        if len(weights) != len(parts):
            raise InputError(f"weights={weights} are not {len(parts)} numbers.", "Give one per part.")
        if sum(part.augments for part in parts) > 1:
            raise InputError(
                "two parts of Mixed augment the images.", "Use at most one Consistency or Perturbed."
            )
        self._parts, self.weights = nn.ModuleList(parts), weights
        self.needs_teacher = any(part.needs_teacher for part in parts)
        self.ascends = any(part.ascends for part in parts)
        self.needs_labels = any(part.needs_labels for part in parts)
        self.differentiable = all(part.differentiable for part in parts)
        self.judges_all = all(part.judges_all for part in parts)
        kinds: list[Reads] = [*{part.reads for part in parts if part.reads != "coefficients"}]
        self.reads = "prediction" if len(kinds) > 1 else kinds[0] if kinds else "coefficients"

    @property
    def parts(self) -> list[Objective]:
        """The objectives, in order."""
        return [part for part in self._parts if isinstance(part, Objective)]

    @property
    def needs_router(self) -> bool:
        """Whether a part reads the router's logits."""
        return any(part.needs_router for part in self.parts)

    @property
    def augments(self) -> bool:
        """Whether a part needs a second view."""
        return any(part.augments for part in self.parts)

    def second_view(self, images: Tensor, task: str, step: int) -> Tensor:
        """Give the view of the part that needs one."""
        return next(part for part in self.parts if part.augments).second_view(images, task, step)

    def build(self, tasks: Sequence[str]) -> None:
        """Let the parts meet the tasks."""
        for part in self.parts:
            part.build(tasks)

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss | None:
        """Give the weighted sum of parts that all read the same, or None where none is worth a step.

        Raises:
            InputError: A part reads something else.
        """
        return self.loss({self.reads: logits}, task, {} if teacher is None else {self.reads: teacher})

    def loss(self, seen: Views, task: str, teacher: Views) -> Loss | None:
        """Give the weighted sum of the parts that are worth a step, or None where none is.

        Args:
            seen: See `Objective.loss`.
            task: Whose images these are.
            teacher: See `Objective.loss`.

        Raises:
            InputError: What a part reads is not there.
        """
        return self._sum([part.loss(seen, task, teacher) for part in self.parts])

    def start_at(self, parameters: Sequence[Tensor]) -> None:
        """Let the parts meet the parameters."""
        for part in self.parts:
            part.start_at(parameters)

    def penalty(self, parameters: Sequence[Tensor]) -> Loss | None:
        """Give the weighted sum of the parts' penalties, or None where there is none."""
        return self._sum([part.penalty(parameters) for part in self.parts])

    def _sum(self, values: Sequence[Loss | None]) -> Loss | None:
        pairs = zip(self.weights, values, strict=True)
        terms = [weight * value for weight, value in pairs if value is not None]
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

    def per_task_state(self) -> Memory:
        """Give, by task, the list of what the parts remember; None where a part knows nothing of a task."""
        states = [part.per_task_state() for part in self.parts]
        tasks = dict.fromkeys(task for state in states for task in state)
        return {task: [state.get(task) for state in states] for task in tasks}

    def load_per_task_state(self, state: Memory) -> None:
        """Take it back."""
        for i, part in enumerate(self.parts):
            known = {task: values[i] for task, values in state.items() if values[i] is not None}
            part.load_per_task_state(known)
