"""BatchNorm's running statistics, measured again in a merged model on unlabelled images."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adamerge.errors import AdamergeWarning, InputError
from adamerge.models.base import Backbone
from adamerge.models.hooks import attached
from adamerge.state import State

_STATISTICS = ("running_mean", "running_var")


@torch.no_grad()
def recalibrate(
    backbone: Backbone,
    weights: State,
    images: Mapping[str, Tensor],
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Measure the running statistics of BatchNorm layers again, as merged ones are only a first guess.

    Merged weights shrink the variance of what layers give (REPAIR, arXiv:2211.08403). Every layer
    normalises by its batch, as in training; nothing else is in training mode. Statistics are those of
    all images together: means, and unbiased variances, over all batches and positions.

    Args:
        backbone: The model; it is left as it is.
        weights: All that it reads, by checkpoint name.
        images: Some inputs of each task. A batch is drawn from all tasks together.
        batch_size: Images per batch.
        seed: Of the order of images.

    Returns:
        The weights, with new running statistics in fp32. The number of batches tracked stays.

    Raises:
        InputError: There are fewer than two images, or the backbone is no module.
    """
    names = [name for name in backbone.names if name.endswith(_STATISTICS)]
    if not names:
        warnings.warn("the model has no BatchNorm layer to recalibrate.", AdamergeWarning, stacklevel=3)
        return dict(weights)
    module = getattr(backbone, "module", None)
    if not isinstance(module, nn.Module):
        raise InputError(
            "this backbone has no module whose layers could be watched.", "Use a ModuleBackbone."
        )
    inputs = torch.cat(list(images.values()))
    if len(inputs) < 2:
        raise InputError(f"{len(inputs)} images cannot tell a variance.", "Give some of every task.")
    stand_ins = {name: torch.ones_like(weights[name], dtype=torch.float32) for name in names}
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    where = next(iter(stand_ins.values())).device
    with _measured(module) as found:
        for batch in order.chunk(max(len(inputs) // batch_size, 1)):  # none is much smaller than the others
            backbone.features({**weights, **stand_ins}, inputs[batch].to(where))
    measured = {id(tensor): value for moments in found.values() for tensor, value in moments.outcome()}
    return dict(weights) | {n: measured[id(t)] for n, t in stand_ins.items() if id(t) in measured}


class _Moments:
    """Mean and variance of a layer's inputs by channel, joined batch by batch (Chan, Golub and LeVeque)."""

    def __init__(self, layer: nn.Module) -> None:
        self.buffers = layer.running_mean, layer.running_var  # the tensors that a pass was given
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Float[Tensor, "channel row"]) -> tuple[Tensor, Tensor]:
        """Take a batch in, and give its own mean and biased variance."""
        variance, mean = torch.var_mean(rows, 1, correction=0)
        total, step = self.count + rows.shape[1], mean - self.mean.to(mean)
        share = rows.shape[1] / total
        self.squares = self.squares.to(mean) + rows.shape[1] * variance + step**2 * self.count * share
        self.mean, self.count = self.mean.to(mean) + step * share, total
        return mean, variance

    def outcome(self) -> Iterator[tuple[Any, Tensor]]:
        """Pair the layer's buffers with what was found for them."""
        return zip(self.buffers, (self.mean, self.squares / (self.count - 1)), strict=True)


@contextmanager
def _measured(module: nn.Module) -> Iterator[dict[nn.Module, _Moments]]:
    """Let BatchNorm layers normalise by their batch, and collect what they see."""
    found: dict[nn.Module, _Moments] = {}

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments = found.setdefault(layer, _Moments(layer))
        rows = args[0].transpose(0, 1).flatten(1).float()
        layer.running_mean, layer.running_var = moments.add(rows)  # for this pass alone

    layers = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    with attached(layer.register_forward_pre_hook(look) for layer in layers):
        yield found
