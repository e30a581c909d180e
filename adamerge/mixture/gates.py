"""Gates of one batch: the mixture of every parameter, made when first needed, kept for the batch."""

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.coefficients import Routing
from adamerge.errors import InputError
from adamerge.models.routed import Mixable
from adamerge.vectors import LowRankBlock


class Gates:
    """The weights of one batch's samples.

    Args:
        routing: Gives weights from features.
        n_samples: Samples of the batch.
        features: What all tensors' weights depend on, for routing that reads the input or the task; None
            for routing that reads blocks or tokens: those compute theirs on the way.
    """

    def __init__(self, routing: Routing, n_samples: int, features: Tensor | None = None) -> None:
        self.routing, self._n_samples = routing, n_samples
        self.logits: dict[str, Tensor] = {}
        self.known: dict[str, Tensor] = {}
        self._seen: list[Tensor] = []
        if features is not None:
            self._open("", features)

    @classmethod
    def of_logits(cls, routing: Routing, logits: Float[Tensor, "sample task"]) -> "Gates":
        """Make the weights of all tensors from a router's logits that are known."""
        gates = cls(routing, len(logits))
        gates.logits[""], gates.known[""] = logits, routing.select_from(logits)
        return gates

    @property
    def n_samples(self) -> int:
        """Samples of the batch."""
        return self._n_samples

    def weights(
        self, name: str, block: Mixable, rows: Float[Tensor, "sample row dim"] | None
    ) -> Float[Tensor, "sample task"] | Float[Tensor, "sample row task"]:
        """Give the weights of a parameter.

        Raises:
            InputError: The weights depend on what a matrix reads, and the first parameter of the group
                that is used is none.
        """
        if self.routing.reads == "token":
            return self._by_token(name, block, rows)
        group = self.routing.group_of(name) or ""
        if group not in self.known:
            if rows is None:
                raise InputError(
                    f"the gate of {group!r} reads what its first matrix reads, but {name} is used before it.",
                    "Route tensors from a matrix on: groups='mlp', for example.",
                )
            self._open(group, rows.mean(1))
        return self.known[group]

    def summary(self) -> Float[Tensor, "sample task"]:
        """Give each sample's weights, the mean over groups (and tokens), for reports."""
        found = [*self.known.values(), *self._seen]
        if not found:
            return torch.zeros(self.n_samples, len(self.routing.tasks))
        return torch.stack([w.detach().float() for w in found]).mean(0)

    def mean_logits(self) -> Float[Tensor, "sample task"]:
        """Give the router's logits, the mean over the gates that were used."""
        return torch.stack(list(self.logits.values())).mean(0)

    def _open(self, group: str, features: Tensor) -> None:
        self.logits[group] = self.routing.logits(features, group)
        self.known[group] = self.routing.select_from(self.logits[group])

    def _by_token(self, name: str, block: Mixable, rows: Tensor | None) -> Tensor:
        if rows is None or not isinstance(block, LowRankBlock):
            raise InputError(
                f"routing by token needs low-rank factors of {name}.", "Store experts with codec low_rank."
            )
        weights = self.routing(projections(block, rows, getattr(self.routing, "gate_rank", 1)))
        self._seen.append(weights.detach().mean(1))
        return weights


def projections(
    block: LowRankBlock, rows: Float[Tensor, "sample row dim"], gate_rank: int
) -> Float[Tensor, "sample row task"]:
    """Give the length of each row's projection on every task's leading right singular vectors."""
    starts = [sum(block.ranks[:task]) for task in range(len(block.ranks))]
    pairs = zip(starts, block.ranks, strict=True)
    taken = [range(start, start + min(gate_rank, rank)) for start, rank in pairs]
    leading = block.right[[i for span in taken for i in span]]
    squares = (rows @ leading.to(rows.dtype).T).float().square()
    owners = [task for task, span in enumerate(taken) for _ in span]
    owner = torch.tensor(owners, dtype=torch.int64, device=rows.device)
    sums = squares.new_zeros(*squares.shape[:-1], len(taken)).index_add(-1, owner, squares)
    return sums.sqrt()
