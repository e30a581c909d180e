"""Routers: small networks that give every sample its own mixture of experts."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adamerge.coefficients.base import Routing
from adamerge.coefficients.selection import Select, Selection
from adamerge.errors import InputError, nearest
from adamerge.ranges import Coefficient, Count, Seed, Share, Temperature, checked

Network = Literal["linear", "paper", "mlp", "bias"]


class _Dropout(nn.Module):
    """Drops half of the values in training, by its own random numbers: a resumed run draws the same."""

    drawn: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.seed = int(torch.randint(2**62, ()))
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Float[Tensor, "sample dim"]) -> Float[Tensor, "sample dim"]:
        if not self.training:
            return x
        generator = torch.Generator().manual_seed(self.seed + int(self.drawn))
        self.drawn += 1
        return x * (2 * torch.randint(2, x.shape, generator=generator)).to(x)


class _Bias(nn.Module):
    """The same logits for every sample."""

    def __init__(self, n_tasks: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n_tasks))

    def forward(self, features: Float[Tensor, "sample dim"]) -> Float[Tensor, "sample task"]:
        return self.bias.expand(len(features), -1)


def _paper(dim: int, n_tasks: int) -> list[nn.Module]:
    """Give the layers of Twin-Merging's router."""
    hidden = [
        layer
        for size in (dim, 2 * dim)
        for layer in (nn.Linear(size, 2 * dim), nn.BatchNorm1d(2 * dim), nn.LeakyReLU(), _Dropout())
    ]
    return [*hidden, nn.Linear(2 * dim, n_tasks)]


def _mlp(dim: int, n_tasks: int) -> list[nn.Module]:
    """Give the layers of WEMoE's gate, its weights drawn from N(0, 0.01^2)."""
    hidden, last = nn.Linear(dim, dim), nn.Linear(dim, n_tasks)
    for layer in (hidden, last):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    return [hidden, nn.ReLU(), last]


_LAYERS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "linear": lambda dim, n_tasks: [nn.Linear(dim, n_tasks)],
    "paper": _paper,
    "mlp": _mlp,
    "bias": lambda _, n_tasks: [_Bias(n_tasks)],
}


def _make(network: str, dim: int, n_tasks: int, initial: float | None) -> nn.Sequential:
    """Draw a network whose last layer starts at ``initial`` for every input (for "mlp": near it)."""
    layers = _LAYERS[network](dim, n_tasks)
    if initial is not None:
        nn.init.constant_(layers[-1].get_parameter("bias"), initial)
        if network in ("linear", "paper"):
            nn.init.zeros_(layers[-1].get_parameter("weight"))
    return nn.Sequential(*layers)


class Router(Routing):
    """A trained network from features to one weight per expert.

    Twin-Merging (arXiv:2406.15479), WEMoE (arXiv:2402.00433) and E-WEMoE are settings of it. In eval mode
    a sample's weights never depend on the samples beside it. In training mode "paper" normalises over its
    batch, which should hold samples of all tasks.

    Args:
        network: "linear": one layer; "paper": d -> 2d -> 2d -> T with batch normalisation, leaky ReLU and
            dropout (Twin-Merging); "mlp": d -> d -> T with ReLU (WEMoE); "bias": the same for all inputs.
        reads: "input": the pooled feature of the shared model, one gate for all tensors; "block": the
            mean over tokens of what a block reads, one gate per block.
        select: "softmax", "top_1", "top_k", "top_p", or "none" for the network's output as it is (WEMoE).
        k: Experts that "top_k" keeps.
        p: Probability that the experts kept by "top_p" must exceed.
        renormalize: Whether the kept weights of "top_k" and "top_p" are divided by their sum.
        temperature: Divides the logits before a softmax.
        initial: Output at the start for every input, e.g. 0.3: task arithmetic, where ``select`` is
            "none". None: the layers' usual random start, and 0 for "bias".
        groups: Pattern of the tensors that are routed, e.g. "mlp"; None: all.
        shared: Whether all blocks share one network (E-WEMoE).
        seed: Seed of the initial weights and of dropout.

    Raises:
        InputError: An option is out of its range, missing, or of no use beside the others.
    """

    @checked
    def __init__(
        self,
        network: Network = "linear",
        reads: Literal["input", "block"] = "input",
        *,
        select: Select = "softmax",
        k: Count | None = None,
        p: Share | None = None,
        renormalize: bool = False,
        temperature: Temperature = 1.0,
        initial: Coefficient | None = None,
        groups: str | None = None,
        shared: bool = False,
        seed: Seed = 0,
    ) -> None:
        super().__init__(groups)
        if network not in _LAYERS:
            raise InputError(f"network={network!r} is unknown.", nearest(str(network), _LAYERS))
        if reads not in ("input", "block"):
            raise InputError(f"reads={reads!r} is unknown.", "A router reads 'input' or 'block'.")
        if shared and reads != "block":
            raise InputError("shared=True is of no use beside reads='input'.", "Leave one of them out.")
        if initial is not None and not math.isfinite(initial):
            raise InputError(f"initial={initial} is not finite.", "Use a number such as 0.3.")
        self.network, self.reads, self.select, self.k, self.p = network, reads, select, k, p
        self.renormalize, self.temperature = renormalize, temperature
        self.initial, self.shared, self.seed = initial, shared, seed
        self.k, self.p, self.renormalize, self.temperature = k, p, renormalize, temperature
        self._selection = Selection(select, k, p, renormalize, temperature)
        self.sizes: dict[str, int] = {}
        self.networks = nn.ModuleList()

    def build(self, tasks: Sequence[str], sizes: Mapping[str, int], /) -> None:
        """Draw a network per group, or one for all where they share it.

        Raises:
            InputError: There is nothing to route; groups of other sizes cannot share a network; ``k`` is
                larger than the number of tasks.
        """
        super().build(tasks, sizes)
        self._selection.require_experts(len(tasks))
        if not sizes:
            raise InputError(f"no tensor is routed: groups={self.groups!r} fits none.", "Use e.g. 'mlp'.")
        if self.shared and len(set(sizes.values())) > 1:
            raise InputError(f"blocks of sizes {dict(sizes)} cannot share a router.", "Use shared=False.")
        self.sizes = dict(sizes)
        self.networks = self._fresh()

    def logits(self, features: Float[Tensor, "sample dim"], group: str = "") -> Float[Tensor, "sample task"]:
        """Give the network's output, in fp32 and outside autocast.

        Raises:
            InputError: The group is unknown, its features have another size, or "paper" is to be trained
                on a single sample.
        """
        size, found = self.sizes.get(group), features.shape[-1]
        if found != size:
            raise InputError(f"the router of group {group!r} reads features of size {size}, found {found}.")
        if self.networks.training and self.network == "paper" and len(features) == 1:
            raise InputError(
                "network='paper' normalises over its batch, and cannot be trained on a single image.",
                "Use a larger batch_size, or network='linear'.",
            )
        with torch.autocast(features.device.type, enabled=False):
            return self._network(group)(features.float())

    def select_from(self, logits: Float[Tensor, "*sample task"]) -> Float[Tensor, "*sample task"]:
        """Give the weights that ``select`` makes of the logits."""
        return self._selection(logits)

    def hard(self) -> "Router":
        """Give this router with top-1 selection: the same networks, the best expert alone."""
        hard = copy(self)
        hard.select, hard.k, hard.p, hard.renormalize, hard.temperature = "top_1", None, None, False, 1.0
        hard._selection = Selection("top_1", None, None, False, 1.0)
        return hard

    def reset(self) -> None:
        """Go back to the initial weights and statistics, in place."""
        self.networks.load_state_dict(self._fresh().state_dict())

    @torch.no_grad()
    def table(self) -> tuple[list[str], Float[Tensor, "task group"]]:
        """Give labels of groups and the weights of an all-zero feature, on the CPU: a linear gate's bias."""
        groups = [next(iter(self.sizes))] if self.shared else list(self.sizes)
        was_training = self.training
        self.eval()
        device = next(self.parameters()).device
        columns = [self(torch.zeros(1, self.sizes[g], device=device), g)[0] for g in groups]
        self.train(was_training)
        labels = ["all"] if self.shared else [group or "all" for group in groups]
        return labels, torch.stack(columns, dim=1).cpu()

    def _network(self, group: str) -> nn.Module:
        return self.networks[0 if self.shared else list(self.sizes).index(group)]

    def _fresh(self) -> nn.ModuleList:
        """Draw the initial networks on the CPU; the global random state stays as it is."""
        sizes = list(self.sizes.values())[: 1 if self.shared else None]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return nn.ModuleList(_make(self.network, size, len(self.tasks), self.initial) for size in sizes)
