"""Routed parameters, torch function by function: what is known is exact, the rest is refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.models.routed import Mixable, RoutedParameter
from adamerge.vectors import DenseCodec, LowRankCodec

SAMPLES, TASKS, DIM = 3, 2, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Given:
    """Random mixtures, differentiable where asked."""

    def __init__(self, n: int = SAMPLES, *, learnt: bool = False) -> None:
        self.table = random(n, TASKS, seed=9).requires_grad_(learnt)

    @property
    def n_samples(self) -> int:
        return len(self.table)

    def weights(self, name: str, block: Mixable, rows: Tensor | None) -> Tensor:
        return self.table


class Pair:
    """A routed parameter, and every sample's own tensor."""

    def __init__(
        self, *shape: int, seed: int = 1, mixing: Given | None = None, low_rank: bool = False
    ) -> None:
        mixing = mixing or Given()
        codec = LowRankCodec(fraction=1.0) if low_rank else DenseCodec()
        block = codec.encode(random(*shape, seed=seed), random(TASKS, *shape, seed=seed + 50))
        self.routed = RoutedParameter.make(f"p{seed}", block, mixing)
        self.own = block.base_tensor() + torch.tensordot(mixing.table, block.dense(), 1)


def for_each(function: Callable[..., Tensor], x: Tensor, *own: Tensor) -> Tensor:
    """Apply a function to every sample with its own parameters."""
    return torch.cat([function(sample[None], *mine) for sample, *mine in zip(x, *own, strict=True)])


Function = Callable[..., Tensor]
SHAPED: dict[str, tuple[Function, tuple[int, ...], list[tuple[int, ...]]]] = {
    "linear": (functional.linear, (5, DIM), [(2, DIM), (2,)]),
    "linear on pooled": (functional.linear, (DIM,), [(2, DIM), (2,)]),
    "linear on maps": (functional.linear, (2, 3, DIM), [(2, DIM)]),
    "matmul": (torch.matmul, (5, DIM), [(DIM, 2)]),
    "@ on pooled": (lambda x, w: x @ w, (DIM,), [(DIM, 2)]),
    "@ of a reshaped matrix": (lambda x, w: x @ w.reshape(DIM, -1), (5, DIM), [(DIM, 2, 1)]),
    "linear of a reshaped matrix": (
        lambda x, w, b: functional.linear(x, w.view(2, DIM), b[0]),
        (5, DIM),
        [(2, 2, 2), (3, 2)],
    ),
    "conv": (functional.conv2d, (3, 6, 5), [(4, 3, 2, 3), (4,)]),
    "strided conv": (
        lambda x, w: functional.conv2d(x, w, None, (2, 1), (1, 2), (1, 2)),
        (3, 7, 6),
        [(4, 3, 3, 2)],
    ),
    "grouped conv": (lambda x, w, b: functional.conv2d(x, w, b, groups=2), (4, 5, 5), [(6, 2, 3, 3), (6,)]),
    "same conv": (lambda x, w: functional.conv2d(x, w, padding="same"), (3, 5, 5), [(2, 3, 3, 3)]),
    "layer norm": (lambda x, w, b: functional.layer_norm(x, (DIM,), w, b), (5, DIM), [(DIM,), (DIM,)]),
    "layer norm of two axes": (
        lambda x, w, b: functional.layer_norm(x, (3, DIM), w, b),
        (2, 3, DIM),
        [(3, DIM), (3, DIM)],
    ),
    "group norm": (lambda x, w, b: functional.group_norm(x, 2, w, b), (DIM, 3, 3), [(DIM,), (DIM,)]),
    "batch norm": (
        lambda x, m, v, w, b: functional.batch_norm(x, m, v, w, b, eps=9.0),
        (DIM, 3, 3),
        [(DIM,)] * 4,
    ),
    "batch norm of vectors": (lambda x, m: functional.batch_norm(x, m, torch.ones(DIM)), (DIM,), [(DIM,)]),
    "sum with a position table": (lambda x, p: x + p, (5, DIM), [(1, 5, DIM)]),
    "sum with a bare position table": (lambda x, p: p + x, (5, DIM), [(5, DIM)]),
    "sum with a map": (lambda x, p: torch.add(x, p[None, :, None]), (DIM, 3, 3), [(DIM, 3)]),
    "scale": (lambda x, g: g * x, (5, DIM), [(DIM,)]),
    "scale of channels": (lambda x, g: x.mul(g.reshape(1, -1, 1, 1)), (DIM, 3, 3), [(DIM,)]),
    "scaled parameter": (lambda x, g: x + 2 * g * torch.tensor(3.0), (5, DIM), [(DIM,)]),
    "class token": (
        lambda x, c: torch.cat([c.view(1, 1, -1).expand(len(x), -1, -1), x], 1),
        (5, DIM),
        [(DIM,)],
    ),
    "slices": (lambda x, p: x + p[:, 1:].unsqueeze(0).contiguous().float(), (5, DIM), [(5, DIM + 1)]),
}


def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, variance, weight, bias = (p[:, None, None] for p in (mean, variance, weight, bias))
    return (x - mean) / (variance + 9).sqrt() * weight + bias


# torch has no gradient of running statistics
PLAIN = {"batch norm": batch_norm, "batch norm of vectors": lambda x, m: (x - m) / (1 + 1e-5) ** 0.5}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("low_rank", [False, True], ids=["dense", "low rank"])
class TestKnown:
    def test_every_sample_has_its_own(self, name: str, low_rank: bool) -> None:
        function, shape, parameters = SHAPED[name]
        x = random(SAMPLES, *shape)
        pairs = [Pair(*s, seed=seed, low_rank=low_rank) for seed, s in enumerate(parameters, 1)]
        expected = for_each(function, x, *(pair.own for pair in pairs))
        assert_close(function(x, *(pair.routed for pair in pairs)), expected, rtol=1e-5, atol=1e-5)

    def test_shared_parameters_may_stand_beside_routed_ones(self, name: str, low_rank: bool) -> None:
        function, shape, parameters = SHAPED[name]
        x = random(SAMPLES, *shape)
        for routed in range(len(parameters)):
            pairs = [Pair(*s, seed=seed, low_rank=low_rank) for seed, s in enumerate(parameters, 1)]
            given = [p.routed if i == routed else p.own[0] for i, p in enumerate(pairs)]
            own = [p.own if i == routed else p.own[:1].expand_as(p.own) for i, p in enumerate(pairs)]
            assert_close(function(x, *given), for_each(function, x, *own), rtol=1e-5, atol=1e-5)

    def test_one_sample_is_a_batch(self, name: str, low_rank: bool) -> None:
        function, shape, parameters = SHAPED[name]
        x, mixing = random(1, *shape), Given(1)
        pairs = [
            Pair(*s, seed=seed, mixing=mixing, low_rank=low_rank) for seed, s in enumerate(parameters, 1)
        ]
        expected = for_each(function, x, *(pair.own for pair in pairs))
        assert_close(function(x, *(pair.routed for pair in pairs)), expected, rtol=1e-5, atol=1e-5)

    def test_gradients_reach_the_mixtures(self, name: str, low_rank: bool) -> None:
        function, shape, parameters = SHAPED[name]
        x, gradients = random(SAMPLES, *shape), []
        for way in ("routed", "own"):
            mixing = Given(learnt=True)
            pairs = [
                Pair(*s, seed=seed, mixing=mixing, low_rank=low_rank) for seed, s in enumerate(parameters, 1)
            ]
            given = [getattr(pair, way) for pair in pairs]
            y = function(x, *given) if way == "routed" else for_each(PLAIN.get(name, function), x, *given)
            (y * random(*y.shape, seed=7)).sum().backward()
            gradients.append(mixing.table.grad)
        assert_close(*gradients, rtol=1e-4, atol=1e-4)


class Attention(nn.Module):
    """Packed attention whose parameters are given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.module = nn.MultiheadAttention(DIM, 2, **({"batch_first": True} | options)).eval()

    def parameters_of(self, mixing: Given, *, low_rank: bool = False) -> dict[str, Pair]:
        shapes = {name: tuple(p.shape) for name, p in self.module.named_parameters()}
        return {
            name: Pair(*shape, seed=seed, mixing=mixing, low_rank=low_rank)
            for seed, (name, shape) in enumerate(shapes.items())
        }

    def forward(self, parameters: dict[str, Tensor], *inputs: Tensor, **options: Any) -> Tensor:
        options = {"need_weights": False} | options
        return torch.func.functional_call(self.module, parameters, inputs, options)[0]


MASK = torch.ones(5, 5, dtype=torch.bool).triu(1)


class TestAttention:
    @pytest.mark.parametrize("low_rank", [False, True])
    @pytest.mark.parametrize(
        "mask", [None, MASK, torch.zeros(5, 5).masked_fill(MASK, -torch.inf)], ids=["none", "bool", "float"]
    )
    def test_every_sample_has_its_own_projections(self, mask: Tensor | None, low_rank: bool) -> None:
        attention, mixing, x = Attention(), Given(), random(SAMPLES, 5, DIM)
        pairs = attention.parameters_of(mixing, low_rank=low_rank)
        found = attention({n: p.routed for n, p in pairs.items()}, x, x, x, attn_mask=mask)
        for i, sample in enumerate(x.split(1)):
            own = {n: p.own[i] for n, p in pairs.items()}
            assert_close(found[i : i + 1], attention(own, sample, sample, sample, attn_mask=mask))

    def test_queries_may_come_from_elsewhere(self) -> None:
        attention, mixing = Attention(bias=False), Given()
        query, source = random(SAMPLES, 2, DIM), random(SAMPLES, 5, DIM, seed=1)
        pairs = attention.parameters_of(mixing)
        found = attention({n: p.routed for n, p in pairs.items()}, query, source, source)
        for i in range(SAMPLES):
            own = {n: p.own[i] for n, p in pairs.items()}
            one = slice(i, i + 1)
            assert_close(found[one], attention(own, query[one], source[one], source[one]))

    def test_a_boolean_mask_forbids_as_torch_has_it(self) -> None:
        x, mixing = random(5, SAMPLES, DIM), Given()
        pairs = list(Attention().parameters_of(mixing).values())
        options = {"training": False, "need_weights": False, "attn_mask": MASK}

        def run(x: Tensor, *p: Tensor) -> Tensor:
            sizes = (x, x, x, DIM, 2)
            return functional.multi_head_attention_forward(
                *sizes, p[0], p[1], None, None, False, 0.0, p[2], p[3], **options
            )[0]

        found = run(x, *(pair.routed for pair in pairs))
        for i in range(SAMPLES):
            assert_close(found[:, i : i + 1], run(x[:, i : i + 1], *(pair.own[i] for pair in pairs)))

    @pytest.mark.parametrize(
        ("made", "called"),
        [
            ({}, {"need_weights": True}),
            ({}, {"key_padding_mask": torch.zeros(SAMPLES, 5, dtype=torch.bool)}),
            ({"add_bias_kv": True}, {}),
            ({"add_zero_attn": True}, {}),
            ({"kdim": 4, "vdim": 3}, {}),
        ],
        ids=["returned weights", "padding", "extra biases", "zero attention", "separate projections"],
    )
    def test_other_forms_are_refused_by_name(self, made: dict[str, Any], called: dict[str, Any]) -> None:
        attention, x = Attention(**made), random(SAMPLES, 5, DIM)
        weights = {n: p.routed for n, p in attention.parameters_of(Given()).items()}
        value = x[..., : made.get("vdim", DIM)]
        with pytest.raises(InputError, match="does not know this form of attention"):
            attention(weights, x, x, value, **called)


class TestEmbedding:
    @pytest.fixture
    def table(self) -> Pair:
        return Pair(7, DIM)

    def test_every_sample_looks_its_words_up_in_its_own_table(self, table: Pair) -> None:
        words = torch.arange(SAMPLES * 5).reshape(SAMPLES, 5) % 7
        expected = torch.stack([own[w] for own, w in zip(table.own, words, strict=True)])
        assert_close(functional.embedding(words, table.routed), expected)

    @pytest.mark.parametrize("places", [torch.arange(5), torch.arange(5)[None]], ids=["bare", "batch of one"])
    def test_places_are_the_same_for_all_samples(self, table: Pair, places: Tensor) -> None:
        x = random(SAMPLES, 5, DIM)
        assert_close(x + functional.embedding(places, table.routed), x + table.own[:, :5])

    def test_tables_of_indices_are_not_taken_for_words(self, table: Pair) -> None:
        looked_up = functional.embedding(torch.arange(4).reshape(2, 2), table.routed)
        assert looked_up.shape == (2, 2, DIM)
        x = random(SAMPLES, 2, 2, DIM)
        assert_close(x + looked_up, x + table.own[:, :4].reshape(SAMPLES, 2, 2, DIM))

    def test_rescaled_tables_are_refused(self, table: Pair) -> None:
        with pytest.raises(InputError, match="max_norm of the embedding p1"):
            functional.embedding(torch.arange(5), table.routed, max_norm=1.0)


def test_windows_of_a_sample_share_its_parameters() -> None:
    """As in Swin: windows stand one after the other in the first axis, sample by sample."""
    w, b, g, m = (
        Pair(*shape, seed=seed) for seed, shape in enumerate([(DIM, DIM), (DIM,), (DIM,), (DIM,)], 1)
    )
    k, d = Pair(2, DIM, 3, 3, seed=5), Pair(DIM, 1, 3, 3, seed=6)
    x, maps = random(2 * SAMPLES, 5, DIM), random(2 * SAMPLES, DIM, 5, 5)
    twice = [p.own.repeat_interleave(2, 0) for p in (w, b, g, m, k, d)]

    def tokens(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Tensor:
        return functional.layer_norm(functional.linear(x, w, b), (DIM,), g, b) * g

    def pixels(x: Tensor, m: Tensor, k: Tensor, d: Tensor) -> Tensor:
        x = functional.batch_norm(x, m, torch.ones(DIM))
        return functional.conv2d(x, k) + functional.conv2d(x, d, groups=DIM)[:, :2]

    found = tokens(x, w.routed, b.routed, g.routed)
    assert_close(found, for_each(tokens, x, *twice[:3]), rtol=1e-5, atol=1e-5)
    found = pixels(maps, m.routed, k.routed, d.routed)
    assert_close(found, for_each(pixels, maps, *twice[3:]), rtol=1e-5, atol=1e-5)


def test_facts_of_a_routed_parameter_are_those_of_a_tensor() -> None:
    routed = Pair(7, DIM).routed
    assert (routed.shape, routed.dim(), len(routed), routed.numel()) == ((7, DIM), 2, 7, 7 * DIM)
    assert (routed.dtype, routed.device.type, routed.is_floating_point()) == (torch.float32, "cpu", True)
    assert routed.view(-1).shape == (7 * DIM,)


X = random(SAMPLES, 5, DIM)
REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "exp": (lambda p: p.exp(), r"does not know torch.Tensor.exp on p1.\nLeave this tensor out"),
    "softmax": (lambda p: functional.softmax(p, 0), "does not know torch.nn.functional.softmax on p1"),
    "of reshaped": (lambda p: p.view(-1).sin(), "does not know torch.Tensor.sin on p1"),
    "in a list": (lambda p: torch.cat([X[0], p]), "does not know torch.cat on p1"),
    "in place": (lambda p: X.clone().mul_(p), "does not know torch.Tensor.mul_ on p1"),
    "values": (lambda p: p.data, "does not know torch.Tensor.data.__get__ on p1"),
    "numbers": (lambda p: p.sum().item(), "does not know torch.Tensor.sum on p1"),
    "matrix @ activations": (lambda p: p @ X.mT, "does not know this matrix product with p1"),
    "two parameters": (lambda p: p + p, "does not know sums and products of parameters"),
    "batch statistics": (
        lambda p: functional.batch_norm(X.mT, p[0], p[0], training=True),
        "no batch statistics.\nUse model.eval",
    ),
    "expanded to tokens": (
        lambda p: p.expand(9, DIM, DIM),
        r"does not know how p1 is expanded to \[9, 4, 4\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        function(Pair(DIM, DIM).routed)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "function",
    [
        functional.linear,
        torch.matmul,
        lambda x, p: x + p[0],
        lambda x, p: x * p[0],
        lambda x, p: functional.layer_norm(x, (DIM,), p[0]),
        lambda x, p: functional.conv2d(x[..., None, None].flatten(0, 1), p[:, :, None, None]),
        lambda x, p: functional.conv2d(x[:, 0, :, None, None], p[:, :1, None, None], groups=DIM),
    ],
)
def test_a_first_axis_that_is_not_the_batch_is_refused(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    routed = Pair(DIM, DIM).routed
    with pytest.raises(InputError, match=r"p1: activations of \d+ rows for 3 samples.\n.*the batch as"):
        function(random(5, SAMPLES + 1, DIM), routed)


def test_values_with_as_many_axes_as_activations_are_refused() -> None:
    with pytest.raises(InputError, match=r"p1: values \[3, 4\] meet activations \[3, 4\]"):
        random(SAMPLES, DIM) + Pair(SAMPLES, DIM).routed
