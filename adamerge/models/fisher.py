"""Diagonals of Fisher information matrices, from gradients of single samples; no labels are needed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from adamerge.errors import NumericError
from adamerge.models.base import Backbone
from adamerge.models.heads import Head
from adamerge.state import State

FisherMode = Literal["exact", "sampled_label", "batch_sqrt"]
MODES = get_args(FisherMode)
_Tensors = dict[str, Tensor]


def fisher_diagonal(
    backbone: Backbone,
    head: Head,
    weights: State,
    batches: Iterable[Tensor],
    names: Sequence[str],
    *,
    mode: FisherMode = "sampled_label",
    generator: torch.Generator | None = None,
    chunk: int = 1,
) -> _Tensors:
    """Estimate the diagonal of the Fisher matrix, the mean over inputs x of squared gradients.

    Args:
        backbone: The model.
        head: Gives p(class | x) from its features.
        weights: All tensors that the backbone reads.
        batches: Inputs of the model.
        names: The weights whose diagonals are wanted.
        mode: "exact": the sum over classes of p(class | x) (gradient of log p(class | x))^2;
            "sampled_label": of one class drawn from p( . | x) for each input, which is the same on average;
            "batch_sqrt": the square of one gradient per batch, of the sum over inputs and classes of
            sqrt(p) log p with p held fixed, as MergeLM and FusionBench have it; its cross terms between
            inputs and classes do not belong to the Fisher matrix.
        generator: Draws the labels; on the CPU.
        chunk: Inputs whose gradients are computed at once.

    Returns:
        fp32, on the CPU; one diagonal in the shape of each weight.

    Raises:
        NumericError: A prediction or a gradient is not finite.
    """
    leaves = {name: weights[name] for name in names}
    model = _Model(backbone, head, weights, leaves)
    total, count = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}, 0
    for batch in batches:
        count += len(batch)
        if mode == "batch_sqrt":
            _add_squares(total, model.batch_gradient(batch), torch.ones(1))
            continue
        probabilities = model.probabilities(batch)
        _require_finite([probabilities])
        for labels, shares in _labels(probabilities, mode, generator):
            pieces = (x.split(chunk) for x in (batch, labels, shares))
            for inputs, classes, share in zip(*pieces, strict=True):
                _add_squares(total, model.sample_gradients(inputs, classes), share)
    _require_finite(total.values())
    return {name: (diagonal / count).cpu() for name, diagonal in total.items()}


def _require_finite(tensors: Iterable[Tensor]) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise NumericError(
            "an expert's predictions on its own images, or their gradients, are not finite.",
            "Does this expert give finite features?",
        )


def _labels(
    probabilities: Float[Tensor, "image class"], mode: str, generator: torch.Generator | None
) -> Iterator[tuple[Int64[Tensor, " image"], Float[Tensor, " image"]]]:
    """Give labels for all images, and what the squared gradient of each counts."""
    if mode == "exact":
        for label, share in enumerate(probabilities.T):
            yield torch.full(share.shape, label, device=share.device), share
    else:
        drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0]
        yield drawn.to(probabilities.device), torch.ones_like(probabilities[:, 0])


def _add_squares(total: _Tensors, gradients: Mapping[str, Tensor], shares: Float[Tensor, " sample"]) -> None:
    for name, gradient in gradients.items():
        total[name] += torch.tensordot(shares.to(gradient.device), gradient.square(), 1)


class _Model:
    """log p(class | input) as a function of the weights whose diagonals are wanted."""

    def __init__(self, backbone: Backbone, head: Head, weights: State, leaves: _Tensors) -> None:
        self.backbone, self.head, self.weights, self.leaves = backbone, head, weights, leaves
        self.can_batch = True

    def log_probabilities(self, leaves: _Tensors, inputs: Tensor) -> Float[Tensor, "image class"]:
        features = self.backbone.features({**self.weights, **leaves}, inputs)
        return self.head.logits(features).log_softmax(-1)

    def probabilities(self, inputs: Tensor) -> Float[Tensor, "image class"]:
        with torch.no_grad():
            return self.log_probabilities(self.leaves, inputs).exp()

    def sample_gradients(self, inputs: Tensor, labels: Int64[Tensor, " image"]) -> _Tensors:
        """Give the gradient of every sample, stacked; one by one where the model cannot be batched."""

        def of_one(leaves: _Tensors, one: Tensor, label: Tensor) -> Tensor:
            return self.log_probabilities(leaves, one[None])[0].gather(0, label[None])[0]

        if len(inputs) > 1 and self.can_batch:
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the only kernel that vmap can batch
                    return vmap(grad(of_one), in_dims=(None, 0, 0))(self.leaves, inputs, labels)
            except RuntimeError:
                self.can_batch = False
        rows = [self._gradient(lambda p, y=y: p[0, y], x[None]) for x, y in zip(inputs, labels, strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in self.leaves}

    def batch_gradient(self, inputs: Tensor) -> _Tensors:
        """Give the one gradient of a batch of which "batch_sqrt" consists, as a stack of one."""
        gradient = self._gradient(lambda p: ((p.detach() / 2).exp() * p).sum(), inputs)
        return {name: rows[None] for name, rows in gradient.items()}

    def _gradient(self, value: Callable[[Tensor], Tensor], inputs: Tensor) -> _Tensors:
        """Differentiate a function of the log probabilities by the weights."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.leaves.items()}
        result = value(self.log_probabilities(leaves, inputs))
        gradients = torch.autograd.grad(result, [*leaves.values()], materialize_grads=True)
        return dict(zip(leaves, gradients, strict=True))
