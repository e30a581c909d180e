"""One relaxed binary mask per tensor that all experts share: which entries take part in the merge."""

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adamerge.coefficients.learned import Clamp, Grouping
from adamerge.ranges import Coefficient, Natural, Seed, Temperature, checked
from adamerge.spaces.base import Numbers, Space
from adamerge.vectors import TaskVectors
from adamerge.vectors.block import Merge

_EPS = torch.finfo(torch.float32).eps


class Concrete(Space):
    """A mask of entries beside the numbers per task and tensor (concrete subspace, arXiv:2312.06173).

    A tensor's merge is base + m / mean(m) x sum over tasks of number x vector, with one relaxed Bernoulli
    mask m = sigmoid((logit + noise) / temperature) for all tasks. Logits start at 0, the noise is logistic,
    the mean is each tensor's own, as in the published code. While training the noise is a function of seed,
    step and tensor alone (and of the kind of device); in evaluation there is none. The vectors stay in their
    stored form.

    As published, masks are learned with `BiLevel`, then numbers under one sample of the masks: ``fix_after``.

    Args:
        grouping: Which tensors share a number, as in `Learned`.
        initial: The numbers' start, as in `Learned`.
        clamp: Of the numbers, as in `Learned`.
        temperature: Divides the logits; lower is nearer to a binary mask.
        fix_after: Steps after which one last sample is the mask, in evaluation as well; None: never.
        dual: Each task has a mask of its own, too: vectors are multiplied by the product of both, over its
            mean. Ours: DAM's abstract (arXiv:2410.13910) speaks of two masks, its code has one. Vectors are
            then expanded, one tensor after another.
        learn_numbers: Otherwise the numbers stay at their start (Concrete Task Arithmetic).
        seed: Of the noise.
        pattern: Which tensors are masked (`re.search`), of those with two or more entries; None: all.

    Raises:
        InputError: An option is out of its range.
    """

    @checked
    def __init__(
        self,
        grouping: Grouping = "tensor",
        initial: Coefficient | list[Coefficient] = 0.3,
        clamp: Clamp = "off",
        *,
        temperature: Temperature = 0.5,
        fix_after: Natural | None = None,
        dual: bool = False,
        learn_numbers: bool = True,
        seed: Seed = 0,
        pattern: str | None = None,
    ) -> None:
        super().__init__(grouping, initial, clamp, pattern=pattern)
        self.temperature, self.fix_after, self.seed = temperature, fix_after, seed
        self.dual, self.learn_numbers = dual, learn_numbers
        self.step = 0

    def build(self, tasks: Sequence[str], what: TaskVectors, /) -> None:
        """Create the parameters for these experts.

        Raises:
            InputError: No tensor can be masked.
        """
        super().build(tasks, what)
        self.matrix.values.requires_grad_(self.learn_numbers)

    def refine(self, name: str, vectors: TaskVectors) -> None:
        """Give a tensor the logits of its mask, or of all masks: the shared one, then each task's."""
        n_tasks, *shape = vectors.blocks[name].shape
        if math.prod(shape) > 1:  # over its mean, the mask of a single entry is 1
            self.fine.add(name, torch.zeros((1 + n_tasks, *shape) if self.dual else shape))

    def merged(self, name: str, numbers: Numbers, vectors: TaskVectors) -> Float[Tensor, "*param"]:
        """Give base + mask * sum over tasks of number * vector."""
        block, mask = vectors.blocks[name], self.mask(name)
        base = block.base_tensor().to(mask)
        if self.dual:
            return base + (torch.einsum("t,t...->t...", numbers, mask) * block.dense().to(mask)).sum(0)
        (found,) = Merge.apply(numbers[:, None], [block])
        return base + mask * (found - base)

    def mask(self, name: str) -> Float[Tensor, "..."]:
        """Give a tensor's mask over its mean, ``[*param]``; with dual masks ``[task, *param]``."""
        logits, is_fixed = self.fine[name], self._is_fixed
        logits = logits.detach() if is_fixed else logits
        if self.training or is_fixed:
            logits = logits + self._noise(name, logits)
        soft = torch.sigmoid(logits / self.temperature)
        if not self.dual:
            return soft / soft.mean()
        both = soft[0] * soft[1:]
        return both / both.mean(tuple(range(1, both.dim())), keepdim=True)

    def effective(self, name: str, numbers: Numbers) -> Numbers:
        """Give the numbers: the mean of every mask is 1."""
        return numbers

    def start(self, name: str) -> Tensor:
        """Give logits of 0."""
        return torch.zeros_like(self.fine[name])

    def reset(self) -> None:
        """Go back to the initial values, in place, and learn masks again."""
        super().reset()
        self.step = 0

    def after_step(self) -> None:
        """Repair the numbers; the next step draws another noise."""
        super().after_step()
        self.step += 1

    def settled(self) -> Iterable[nn.Parameter]:
        """Give the masks' parameters once they are fixed."""
        return self.fine.parameters() if self._is_fixed else ()

    def get_extra_state(self) -> Tensor:
        """Give the number of steps, a part of the state."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Take it back."""
        self.step = int(state)

    @property
    def _is_fixed(self) -> bool:
        return self.fix_after is not None and self.step >= self.fix_after

    def _noise(self, name: str, like: Tensor) -> Tensor:
        """Draw logistic noise: the same for the same step, however often it merges."""
        step = self.fix_after if self._is_fixed else self.step
        digest = hashlib.sha256(f"{self.seed}/{step}/{name}".encode()).digest()[:8]
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.rand(like.shape, generator=generator, device=like.device).logit(_EPS)
