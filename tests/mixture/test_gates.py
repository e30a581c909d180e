"""Gates: when each tensor's mixture is made, what it reads, and who shares it."""

from pathlib import Path

import pytest
import torch
from conftest import TASKS
from tiny_mixtures import FULL, literal, make_mixture, uint8_images, vectors_of
from torch import Tensor
from torch.testing import assert_close

from adamerge.coefficients import Oracle, Router, Subspace, Uniform
from adamerge.errors import InputError
from adamerge.mixture import Gates
from adamerge.mixture.gates import projections
from adamerge.vectors import DenseCodec, LowRankBlock, LowRankCodec

BLOCK = "visual.transformer.resblocks.0"
FIRST, SECOND = f"{BLOCK}.mlp.c_fc.weight", f"{BLOCK}.mlp.c_proj.weight"
DIM = 6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(*shape: int, ranks: tuple[int, ...] = (4, 4, 4)) -> LowRankBlock:
    vectors = torch.stack([random(*shape, seed=s) for s in range(len(ranks))])
    block = LowRankCodec(fraction=1.0).encode(random(*shape, seed=9), vectors)
    parts = zip(block.left.split(block.ranks), block.right.split(block.ranks), ranks, strict=True)
    left, right = zip(*((u[:rank], v[:rank]) for u, v, rank in parts), strict=True)
    return LowRankBlock(block.base, torch.cat(left), torch.cat(right), ranks)


def dense(*shape: int) -> DenseCodec:
    return DenseCodec().encode(random(*shape), random(len(TASKS), *shape))


class CountingRouter(Router):
    """Remembers what its gates read."""

    def logits(self, features: Tensor, group: str = "") -> Tensor:
        self.read = [*getattr(self, "read", []), (group, features)]
        return super().logits(features, group)


class TestInput:
    def test_one_mixture_serves_all_tensors(self) -> None:
        router = Router()
        router.build(TASKS, {"": DIM})
        gates = Gates(router, 5, random(5, DIM))
        weights = gates.weights("class_embedding", dense(DIM), None)
        assert torch.equal(weights, router(random(5, DIM)))
        assert gates.weights(FIRST, dense(8, DIM), random(5, 7, DIM)) is weights
        assert torch.equal(gates.summary(), weights)
        assert torch.equal(gates.mean_logits(), router.logits(random(5, DIM)))


class TestBlocks:
    @pytest.fixture
    def router(self) -> CountingRouter:
        router = CountingRouter(reads="block")
        router.build(TASKS, {BLOCK: DIM})
        return router

    def test_a_gate_reads_the_mean_token_of_its_first_matrix_and_serves_the_rest(
        self, router: CountingRouter
    ) -> None:
        gates, rows = Gates(router, 5), random(5, 7, DIM)
        first = gates.weights(FIRST, dense(8, DIM), rows)
        assert torch.equal(first, router(rows.mean(1), BLOCK))
        assert gates.weights(FIRST.replace("weight", "bias"), dense(8), None) is first
        assert gates.weights(SECOND, dense(DIM, 8), random(5, 7, 8)) is first

    def test_a_tensor_before_the_first_matrix_is_refused(self, router: CountingRouter) -> None:
        with pytest.raises(InputError, match="ln_1.weight is used before it.\nRoute tensors from"):
            Gates(router, 5).weights(f"{BLOCK}.ln_1.weight", dense(DIM), None)

    def test_nothing_is_known_before_the_pass(self, router: CountingRouter) -> None:
        assert torch.equal(Gates(router, 5).summary(), torch.zeros(5, len(TASKS)))

    @pytest.mark.parametrize("groups", [r"\.mlp\.", r"\.attn\.", r"c_proj"])
    def test_a_pass_equals_merging_by_the_gates(self, clip: Path, groups: str) -> None:
        """So biases go the way of their matrix, and later matrices the way of the first."""
        router = CountingRouter(reads="block", groups=groups)
        mixture, images = make_mixture(clip, router), uint8_images()
        gates = mixture.gates(images)
        with torch.no_grad():
            found = mixture.features(images, gates)
            assert [group for group, _ in router.read] == [BLOCK, BLOCK.replace("0", "1")]
            weights = {name: gates.known[router.group_of(name)] for name in mixture.routed}
            assert len({tuple(w.flatten().tolist()) for w in weights.values()}) == 2
            assert_close(found, literal(mixture, weights, images), rtol=1e-5, atol=1e-5)
        assert_close(gates.summary(), torch.stack([*gates.known.values()]).mean(0))


class TestTokens:
    def test_scores_are_lengths_of_projections(self) -> None:
        block, rows = low_rank(8, DIM), random(5, 7, DIM)
        for k in (1, 2, 4, 9):
            found = projections(block, rows, k)
            for task, vector in enumerate(block.dense()):
                leading = torch.linalg.svd(vector, full_matrices=False).Vh[: min(k, 4)]
                assert_close(found[..., task], (rows @ leading.T).norm(dim=-1), rtol=1e-4, atol=1e-5)

    def test_experts_may_have_any_rank(self) -> None:
        block, rows = low_rank(8, DIM, ranks=(0, 3, 1)), random(5, 7, DIM)
        found = projections(block, rows, 2)
        assert torch.equal(found[..., 0], torch.zeros(5, 7))
        assert_close(found[..., 1], (rows @ block.right[:2].T).norm(dim=-1))
        assert_close(found[..., 2], (rows @ block.right[3]).abs())

    def test_every_token_has_its_own_mixture_at_every_matrix(self) -> None:
        routing = Subspace(gate_rank=2, top_k=2)
        routing.build(TASKS, {})
        gates, rows = Gates(routing, 5), random(5, 7, DIM)
        first, second = (low_rank(8, DIM), low_rank(4, DIM, ranks=(1, 1, 1)))
        found = [gates.weights(name, block, rows) for name, block in ((FIRST, first), (SECOND, second))]
        for weights, block in zip(found, (first, second), strict=True):
            best = projections(block, rows, 2).softmax(-1).topk(2)
            expected = torch.zeros(5, 7, 3).scatter(-1, best.indices, best.values)
            assert_close(weights, expected / expected.sum(-1, keepdim=True))
        assert_close(gates.summary(), torch.stack(found).mean((0, 2)))

    def test_a_pass_adds_what_the_formula_says(self, clip: Path) -> None:
        """Y = W x + b + sum over experts of weight x (U S V' x + difference of biases), SMILE's formula."""
        mixture = make_mixture(clip, Subspace(), LowRankCodec(rank=3))
        name, read, given = f"{BLOCK}.mlp.c_fc", [], []
        module = mixture.backbone.module.get_submodule(name.removeprefix("visual."))
        hook = module.register_forward_hook(lambda _, x, y: (read.append(x[0]), given.append(y))[0])
        mixture.predict(uint8_images())
        hook.remove()
        weight, bias = (mixture.vectors.blocks[f"{name}.{part}"] for part in ("weight", "bias"))
        x = read[-1]
        expert = projections(weight, x, 1).argmax(-1)
        expected = x @ weight.base_tensor().T + bias.base_tensor()
        expected = expected + torch.einsum("btoi,bti->bto", weight.dense()[expert], x) + bias.dense()[expert]
        assert_close(given[-1], expected, rtol=1e-5, atol=1e-5)
        assert len(expert.unique()) > 1

    def test_only_linear_layers_of_low_rank_are_routed(self, clip: Path) -> None:
        mixture = make_mixture(clip, Subspace(), FULL)
        parts = ("attn.in_proj_", "attn.out_proj.", "mlp.c_fc.", "mlp.c_proj.")
        assert set(mixture.routed) == {
            f"{BLOCK.replace('0', block)}.{part}{kind}"
            for block in "01"
            for part in parts
            for kind in ("weight", "bias")
        }

    def test_one_expert_of_full_rank_comes_back_exactly(self, clip: Path) -> None:
        vectors = vectors_of(clip, 1)
        expert = vectors.merge(vectors.one_hot(TASKS[0]))
        linear = make_mixture(clip, Subspace(), n_tasks=1).routed
        shared = {
            name: block.base_tensor() if name in linear else expert[name]
            for name, block in vectors.blocks.items()
        }
        mixture, images = make_mixture(clip, Subspace(), shared=shared, n_tasks=1), uint8_images()
        with torch.no_grad():
            found = mixture.features(images, mixture.gates(images))
            assert_close(found, mixture.backbone.features(expert, images), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(found, mixture.backbone.features(shared, images), atol=1e-2)

    def test_other_forms_are_refused(self) -> None:
        routing = Subspace()
        routing.build(TASKS, {})
        for block, rows in ((dense(8, DIM), random(5, 7, DIM)), (low_rank(8, DIM), None)):
            with pytest.raises(InputError, match="routing by token needs low-rank factors of w.\nStore"):
                Gates(routing, 5).weights("w", block, rows)


def test_untrained_mixtures_are_the_same_for_all_tensors() -> None:
    for routing, features in ((Oracle(), torch.tensor([2, 0])), (Uniform(), random(2, DIM))):
        routing.build(TASKS, {})
        gates = Gates(routing, 2, features)
        assert torch.equal(gates.weights(FIRST, dense(8, DIM), random(2, 7, DIM)), routing(features))
