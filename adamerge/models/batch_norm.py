"""BatchNorm layers whose running statistics are merged tensors: differentiable in them, and valid."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adamerge.errors import NumericError

_LEAVES = ("running_mean", "running_var", "weight", "bias")


class MergedNorms:
    """The BatchNorm layers of a module.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        named = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
        kept = [(name, layer) for name, layer in named if layer.track_running_stats and layer.affine]
        self.eps = {f"{name}.".lstrip("."): layer.eps for name, layer in kept}

    def prepared(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give a module's tensors in a form whose gradient reaches the running statistics.

        torch differentiates evaluation by weight and bias alone. So the statistics become constants, and
        weight and bias, with the same values, carry what a change of the statistics would do.

        Args:
            own: By the module's names.

        Raises:
            NumericError: A variance is negative, as merging with large coefficients can make it.
        """
        held = {
            p: eps for p, eps in self.eps.items() if all(_is_plain(own.get(p + leaf)) for leaf in _LEAVES)
        }
        _require_variances({name: own[name] for name in (f"{prefix}running_var" for prefix in held)})
        ready = dict(own)
        for prefix, eps in held.items() if torch.is_grad_enabled() else ():
            mean, variance, weight, bias = (own[prefix + leaf] for leaf in _LEAVES)
            inverse = (variance + eps).rsqrt()
            turned = weight * (inverse / inverse.detach())
            moved = bias - weight * inverse * (mean - mean.detach())
            still = mean.detach(), variance.detach(), turned, moved
            ready |= {prefix + leaf: tensor for leaf, tensor in zip(_LEAVES, still, strict=True)}
        return ready


def _is_plain(tensor: Tensor | None) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)  # not one that is another for every sample


def _require_variances(variances: Mapping[str, Tensor]) -> None:
    if not variances:
        return
    lowest = torch.stack([variance.detach().amin() for variance in variances.values()])
    if (lowest < 0).any():
        name = [*variances][int(lowest.argmin())]
        raise NumericError(
            f"a merged variance of BatchNorm is negative: {name} has {lowest.min():.3g}.",
            "Use smaller coefficients, or recalibrate: adamerge.recalibrate(...).",
        )
