"""From a router's logits to the weights of experts: which stay, and how much each counts."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor, special

from adamerge.errors import InputError, nearest

Select = Literal["softmax", "top_1", "top_k", "top_p", "none"]
Logits = Float[Tensor, "*sample task"]
Weights = Float[Tensor, "*sample task"]

_READ_BY: dict[str, tuple[str, ...]] = {
    "softmax": ("temperature",),
    "top_1": (),
    "top_k": ("k", "renormalize", "temperature"),
    "top_p": ("p", "renormalize", "temperature"),
    "none": (),
}


def softmax(logits: Logits, temperature: float = 1.0) -> Weights:
    """Give probabilities, in fp32."""
    return (logits.float() / temperature).softmax(-1)


def top_1(logits: Logits) -> Weights:
    """Give 1 to the largest (of equals, the first) and exactly 0 to the others.

    Its gradient is that of the kept probability (straight-through): a constant could not be trained.
    """
    p = softmax(logits)
    return (_rank(p) < 1) * (1 + (p - p.detach()))


def top_k(logits: Logits, k: int, *, renormalize: bool = False, temperature: float = 1.0) -> Weights:
    """Keep the probabilities of the ``k`` largest; the others are exactly 0."""
    p = softmax(logits, temperature)
    return _kept(p, _rank(p) < k, renormalize)


def top_p(logits: Logits, p: float, *, renormalize: bool = False, temperature: float = 1.0) -> Weights:
    """Keep the fewest experts whose probabilities sum to more than ``p`` (arXiv:2403.07652).

    The expert that crosses ``p`` is kept; 0 keeps one expert, 1 keeps all. As published the kept
    probabilities stay as they are.
    """
    probabilities = softmax(logits, temperature)
    sums = probabilities.detach().sort(dim=-1, descending=True).values.cumsum(-1)
    short = sums[..., :-1].clamp(max=1) <= p  # rounding may sum to more than 1
    return _kept(probabilities, _rank(probabilities) <= short.sum(-1, keepdim=True), renormalize)


def spread(weights: Weights) -> Float[Tensor, "*sample"]:
    """Give the entropy of routing weights, in units of log T.

    0: one expert alone; 1: all experts alike; NaN: no expert has any weight. Weights that do not sum to 1
    are divided by the sum of their magnitudes.
    """
    shares = weights.abs() / weights.abs().sum(-1, keepdim=True)
    return special.entr(shares).sum(-1) / math.log(max(weights.shape[-1], 2))


def _rank(p: Logits) -> Int[Tensor, "*sample task"]:
    """Give each expert's place, 0 for the largest; of equals the first comes first, in any batch."""
    return p.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _kept(p: Weights, kept: Tensor, renormalize: bool) -> Weights:
    weights = p * kept
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights


@dataclass(frozen=True)
class Selection:
    """A rule with its options, as a router is configured with.

    Raises:
        InputError: An option is out of its range, missing, or of no use to the rule.
    """

    select: Select = "softmax"
    k: int | None = None
    p: float | None = None
    renormalize: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.select not in _READ_BY:
            raise InputError(
                f"select={self.select!r} is unknown.", nearest(str(self.select), get_args(Select))
            )
        for option in fields(self)[1:]:
            value, is_read = getattr(self, option.name), option.name in _READ_BY[self.select]
            if value != option.default and not is_read:
                raise InputError(f"{option.name}={value} is not read by select={self.select!r}.")
            if value is None and is_read:
                raise InputError(f"select={self.select!r} needs {option.name}.", "Give e.g. k: 2, or p: 0.4.")
        self._require_ranges()

    def _require_ranges(self) -> None:
        if self.k is not None and self.k < 1:
            raise InputError(f"k={self.k} keeps no expert.", "Use 1 or more.")
        if self.p is not None and not 0 <= self.p <= 1:
            raise InputError(f"p={self.p} is outside [0, 1].", "Use e.g. 0.4.")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature} is not positive and finite.", "Use e.g. 1.0.")

    def __call__(self, logits: Logits) -> Weights:
        """Give the weights that the rule selects, in fp32."""
        if self.select == "none":
            return logits.float()
        if self.select == "top_1":
            return top_1(logits)
        rule = {"softmax": softmax, "top_k": top_k, "top_p": top_p}[self.select]
        return rule(logits, **{option: getattr(self, option) for option in _READ_BY[self.select]})

    def require_experts(self, n_tasks: int) -> None:
        """Refuse to keep more experts than there are.

        Raises:
            InputError: ``k`` is larger.
        """
        if self.k is not None and self.k > n_tasks:
            raise InputError(f"k={self.k} experts cannot be kept of {n_tasks}.", f"Use 1 to {n_tasks}.")
