"""Methods that decompose matrices: examples by hand, what they have in common, and wrong options."""

from collections.abc import Callable

import pytest
import torch
from matrices import SHAPES, diagonal, low_rank, merged, random, rotation
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.static.primitives import spectral
from adamerge.static.primitives.spectral import gram, product, svd

ALL = ["tsv", "iso_c", "iso_cts", "svc", "knots", "wudi", "opcm"]
PINNED = (17**0.5 + 13**0.5) / 2 / 17**0.5


def weighted(a: float, b: float) -> float:
    """Weigh the entries by their squares, over the squared norms of the two matrices below."""
    return (a**3 / 17 + b**3 / 13) / (a**2 / 17 + b**2 / 13)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("tsv", {}, [4, 3]),  # the leading direction of each
        ("iso_c", {}, [5, 5]),
        ("iso_c", {"scale": 0.5}, [2.5, 2.5]),
        ("iso_cts", {"common_share": 0.0}, [3.5, 3.5]),
        ("svc", {}, [6 * 2 / (6 / 4 + 6 / 2), 4 * 2 / (4 / 1 + 4 / 3)]),
        ("knots", {"density": 1.0}, [3, 2]),
        ("knots", {"density": 1.0, "aggregate": "sum"}, [6, 4]),
        ("knots", {"density": 0.25, "aggregate": "max"}, [4, 3]),
        ("wudi", {"solver": "closed_form"}, [weighted(4, 2), weighted(1, 3)]),
        ("opcm", {}, [4 * PINNED, PINNED]),  # both directions are occupied already
    ],
)
def test_diagonal_matrices_by_hand(method: str, options: dict[str, object], expected: list[float]) -> None:
    found = merged(method, diagonal([4, 1], [2, 3]), **options)
    assert_close(found, torch.diag(torch.tensor(expected).float()))


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("tasks", [1, 3])
def test_vectors_of_zeros_merge_to_exactly_zero(method: str, tasks: int) -> None:
    for shape in [(), (4,), (3, 5), (5, 3), (0, 4), (2, 0), (2, 2, 2)]:
        assert torch.equal(merged(method, torch.zeros(tasks, *shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [random, low_rank])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tsv", {}),
        ("svc", {}),
        ("knots", {"density": 1.0}),
        ("wudi", {}),
        ("wudi", {"solver": "closed_form"}),
        ("opcm", {}),
    ],
)
def test_one_expert_merges_to_itself(
    method: str, options: dict[str, object], make: Callable[..., Tensor], shape: tuple[int, int]
) -> None:
    stack = make(shape, tasks=1)
    assert_close(merged(method, stack, **options), stack[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_expert_is_kept_bit_for_bit_where_nothing_is_decomposed(shape: tuple[int, int]) -> None:
    stack = random(shape, tasks=1)
    for method in ["svc", "wudi", "opcm"]:
        assert torch.equal(merged(method, stack), stack[0])
    assert torch.equal(merged("wudi", stack, solver="closed_form"), stack[0])


@pytest.mark.parametrize("method", [name for name in ALL if name != "opcm"])
@pytest.mark.parametrize("make", [random, low_rank])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_experts_does_not_matter(
    method: str, make: Callable[..., Tensor], shape: tuple[int, int]
) -> None:
    stack = make(shape, tasks=4)
    assert_close(merged(method, stack.flip(0)), merged(method, stack), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [*((name, {}) for name in ALL if name != "wudi"), ("wudi", {"solver": "closed_form"})],
)
@pytest.mark.parametrize("make", [random, low_rank])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_of_the_outputs_and_the_signs_of_singular_vectors_do_not_matter(
    method: str, options: dict[str, object], make: Callable[..., Tensor], shape: tuple[int, int]
) -> None:
    """Rotated experts merge to the rotated merge."""
    stack, turn = make(shape, tasks=3), rotation(shape[0])
    assert_close(
        merged(method, turn @ stack, **options), turn @ merged(method, stack, **options), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "wudi", "knots"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2), (2, 1, 3, 2)])
def test_other_tensors_are_the_mean_without_the_scale(method: str, shape: tuple[int, ...]) -> None:
    options = {} if method == "wudi" else {"scale": 2.0}
    assert_close(merged(method, random(shape), **options), random(shape).mean(0))


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts"])
def test_matrices_may_be_named_other_tensors(method: str) -> None:
    stack = random((4, 3))
    mean = stack.mean(0)
    assert torch.equal(merged(method, stack, name="text_projection.weight"), mean)
    assert torch.equal(merged(method, stack, name="lm_head.weight", others=["*embed*", "lm_head.*"]), mean)
    for others in [[], ["projection"]]:
        assert not torch.allclose(merged(method, stack, name="text_projection", others=others), mean)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("iso_cts", {"common_share": 80.0}, "common_share=80.0 is outside [0, 1].\nUse e.g. 0.5."),
        ("opcm", {"alpha": -0.1}, "alpha=-0.1 is outside [0, 1].\nUse e.g. 0.5."),
        ("svc", {"floor": 0.0}, "floor=0.0 is not positive.\nUse e.g. 0.1."),
        ("knots", {"merger": "tie"}, "merger='tie' is unknown.\nUse 'ties' or 'linear'."),
        ("knots", {"cutoff": -1.0}, "cutoff=-1.0 is negative.\nUse e.g. 1e-4."),
        ("knots", {"density": 20.0}, "density=20.0 is outside (0, 1].\nDid you mean 0.2?"),
        ("knots", {"drop_rate": 1.0}, "drop_rate=1.0 is outside [0, 1).\nUse e.g. 0.5."),
        ("wudi", {"solver": "sgd"}, "solver='sgd' is unknown.\nUse 'adam' or 'closed_form'."),
        ("wudi", {"lr": 0.0}, "steps=300 with lr=0.0 leads nowhere.\nUse e.g. steps=300 and lr=1e-5."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        merged(method, random((3, 4)), **options)
    assert str(caught.value) == message


class TestDecompositions:
    @pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
    def test_a_gram_matrix_is_as_exact_as_an_svd(self, shape: tuple[int, int]) -> None:
        """The polar factor of an fp32 matrix of condition 1e4, which amplifies every error."""
        left, right = torch.linalg.qr(random(shape, 1).double()[0]).Q, rotation(min(shape)).double()
        matrix = (left[:, : min(shape)] * torch.logspace(0, -4, min(shape)) @ right[:, : min(shape)]).float()
        if shape[0] < shape[1]:
            matrix = matrix @ torch.linalg.qr(random((60, 40), 1).double()[0]).Q.T.float()
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        found = svd(matrix)
        assert_close(found.values, s, rtol=1e-8, atol=0)
        assert_close(found.left @ found.right.T, u @ vh, rtol=0, atol=1e-7)

    def test_rounding_is_no_direction(self) -> None:
        matrix = low_rank((30, 20), tasks=1)[0]
        assert len(svd(matrix).values) == 2

    def test_products_in_pieces_are_whole_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        a, b = random((7, 3), 1)[0], random((7, 4), 1)[0]
        monkeypatch.setattr(spectral, "_CHUNK", 8)
        assert_close(gram(a, b), a.double().T @ b.double())
        assert_close(gram(a), a.double().T @ a.double())
        assert_close(product(a, b[:3], torch.float64), a.double() @ b[:3].double())
