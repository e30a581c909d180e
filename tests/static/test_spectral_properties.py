"""What TSV-Merge, Iso-C, Iso-CTS, SVC, KnOTS, WUDI-Merging and OPCM promise, one by one."""

from collections.abc import Callable

import pytest
import torch
from matrices import SHAPES, diagonal, low_rank, merged, random, rotation
from torch import Tensor
from torch.testing import assert_close

from adamerge.static import METHODS
from adamerge.static.iso_cts import _own_directions
from adamerge.vectors import Stacks


class TestTSV:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_singular_values_are_the_leading_ones_of_the_tasks(self, shape: tuple[int, int]) -> None:
        """For the joined singular vectors are orthonormal."""
        stack = random(shape, tasks=2)
        leading = torch.linalg.svdvals(stack)[:, : min(shape) // 2].flatten().sort(descending=True).values
        assert_close(torch.linalg.svdvals(merged("tsv", stack))[: len(leading)], leading)

    def test_experts_with_the_same_triplets_share_them(self) -> None:
        stack = diagonal([3.0, 2.0], [3.0, 2.0])
        assert_close(merged("tsv", stack), torch.diag(torch.tensor([3.0, 0.0])))

    def test_fewer_singular_values_than_tasks_leave_nothing(self) -> None:
        assert torch.equal(merged("tsv", random((2, 7), tasks=3)), torch.zeros(2, 7))


class TestIso:
    @pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_all_singular_values_are_equal(self, method: str, shape: tuple[int, int]) -> None:
        values = torch.linalg.svdvals(merged(method, random(shape, tasks=2)))
        assert_close(values, values[:1].expand_as(values))

    @pytest.mark.parametrize("make", [random, low_rank])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_iso_c_keeps_trace_norm_rank_and_range(
        self, make: Callable[..., Tensor], shape: tuple[int, int]
    ) -> None:
        stack = make(shape, tasks=2)
        before, after = stack.sum(0), merged("iso_c", stack)
        assert_close(torch.linalg.svdvals(after).sum(), torch.linalg.svdvals(before).sum())
        assert torch.linalg.matrix_rank(after) == torch.linalg.matrix_rank(before)
        assert_close(after @ torch.linalg.pinv(before) @ before, after, rtol=1e-4, atol=1e-4)

    def test_exact_cancellation_leaves_nothing_to_blow_up(self) -> None:
        a, b = random((5, 4), tasks=2)
        assert_close(merged("iso_c", torch.stack([a, b, -a])), merged("iso_c", b[None]))
        assert torch.equal(merged("iso_c", torch.stack([a, -a])), torch.zeros(5, 4))

    @pytest.mark.parametrize("make", [random, low_rank])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_iso_cts_with_common_directions_alone_is_iso_c(
        self, make: Callable[..., Tensor], shape: tuple[int, int]
    ) -> None:
        stack = make(shape, tasks=3)
        assert_close(merged("iso_cts", stack, common_share=1.0), merged("iso_c", stack))
        assert_close(merged("iso_cts", stack[:1], common_share=0.4), merged("iso_c", stack[:1]))

    @pytest.mark.parametrize(
        ("rank", "tasks", "share", "own"),
        [(768, 8, 0.8, 19), (5, 8, 0.8, 0), (5, 3, 0.0, 1), (10, 2, 0.8, 1)],
    )
    def test_the_specific_directions_are_shared_out_evenly(
        self, rank: int, tasks: int, share: float, own: int
    ) -> None:
        assert _own_directions(rank, tasks, share) == own


class TestSVC:
    def test_what_two_experts_share_counts_once(self) -> None:
        stack = random((5, 4), tasks=1).expand(2, 5, 4)
        assert_close(merged("svc", stack), stack[0])

    def test_what_one_expert_has_alone_stays(self) -> None:
        stack = diagonal([3, 0, 0], [0, 2, 1])
        assert torch.equal(merged("svc", stack), stack.sum(0))

    def test_the_floor_bounds_the_inflation(self) -> None:
        stack = diagonal([1.0, 2.0])
        found = merged("svc", stack, merged=torch.diag(torch.tensor([-1.0, 0.2])), floor=0.25)
        assert_close(found, torch.diag(torch.tensor([-4.0, 0.8])))

    def test_equal_singular_values_share_their_factor(self) -> None:
        stack = random((6, 5))
        isotropic = merged("iso_c", stack)
        found = merged("svc", stack, merged=isotropic)
        assert_close(found, found.norm() / isotropic.norm() * isotropic)

    def test_other_tensors_stay_as_they_were_merged(self) -> None:
        stack = random((4,))
        assert torch.equal(merged("svc", stack), stack.sum(0))


class TestKnOTS:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_linear_sum_is_task_arithmetic(self, shape: tuple[int, int]) -> None:
        stack = random(shape)
        found = merged("knots", stack, merger="linear", aggregate="sum", scale=0.3)
        assert_close(found, 0.3 * stack.sum(0))

    def test_weak_directions_are_left_out(self) -> None:
        stack = diagonal([1.0, 2e-4], [2.0, 1e-4])
        assert merged("knots", stack, density=1.0, cutoff=1e-3)[1, 1] == 0
        assert merged("knots", stack, density=1.0)[1, 1] > 0

    def test_the_trimming_looks_at_the_whole_model(self) -> None:
        stacks = {"large": diagonal([4.0, 3.0]), "small": diagonal([2.0, 1.0])}
        apply = METHODS["knots"].function(Stacks.of(stacks), density=0.125)
        assert_close(apply(stacks["large"], name="large"), stacks["large"][0])
        assert not apply(stacks["small"], name="small").any()

    def test_opposed_experts_cancel(self) -> None:
        a = random((5, 4), tasks=1)[0]
        assert not merged("knots", torch.stack([a, -a]), density=1.0).any()

    def test_experts_in_disjoint_directions_do_not_halve_one_another(self) -> None:
        """What rounding leaves of a coordinate that is 0 does not count as an entry of the mean."""
        turn = rotation(6)
        stack = torch.stack([turn[:, :3] @ random((3, 4), 1, 5)[0], turn[:, 3:] @ random((3, 4), 1, 6)[0]])
        assert_close(merged("knots", stack, density=1.0), stack.sum(0))

    def test_dropping_keeps_the_expected_merge(self) -> None:
        stack = random((6, 5))
        options = {"merger": "linear", "aggregate": "sum", "drop_rate": 0.5}
        found = torch.stack([merged("knots", stack, seed=seed, **options) for seed in range(400)])
        assert_close(found.mean(0), stack.sum(0), rtol=0, atol=6 * 0.05 * float(stack.norm(dim=0).max()))
        assert not torch.equal(found[0], found[1])
        assert torch.equal(found[1], merged("knots", stack, seed=1, **options))

    def test_trimming_chooses_among_what_was_not_dropped(self) -> None:
        stack = torch.arange(1.0, 41).diag()[None]
        kept = [
            merged("knots", stack, density=1 / 1600, drop_rate=0.5, seed=seed).diagonal() for seed in range(9)
        ]
        assert all(found.count_nonzero() == 2 for found in kept)  # one, and the threshold itself
        assert len({float(found.max()) for found in kept}) > 1
        assert all(round(float(found.max())) % 2 == 0 for found in kept)  # rescaled by 1 / 0.5

    def test_a_parameter_without_strong_directions_stays(self) -> None:
        assert torch.equal(merged("knots", 1e-6 * random((4, 3))), torch.zeros(4, 3))


def interference(m: Tensor, stack: Tensor) -> Tensor:
    """The loss of WUDI-Merging."""
    return sum(((m - v) @ v.T).square().sum() / v.square().sum() for v in stack)


class TestWUDI:
    @pytest.mark.parametrize("shape", [*SHAPES, (3, 40)])
    @pytest.mark.parametrize("make", [random, low_rank])
    def test_the_gradient_vanishes_at_the_closed_form(
        self, make: Callable[..., Tensor], shape: tuple[int, int]
    ) -> None:
        stack = make(shape, tasks=2)
        found = merged("wudi", stack, solver="closed_form").double().requires_grad_()
        (gradient,) = torch.autograd.grad(interference(found, stack.double()), found)
        (at_sum,) = torch.autograd.grad(interference(found, stack.double() + 1), found)
        assert gradient.norm() < 1e-5 * at_sum.norm()

    @pytest.mark.parametrize("shape", [*SHAPES, (3, 40)])
    def test_the_loss_falls_with_every_step(self, shape: tuple[int, int]) -> None:
        stack = random(shape)
        losses = [
            float(interference(merged("wudi", stack, steps=n, lr=1e-3), stack)) for n in range(0, 40, 5)
        ]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 1e-3

    def test_no_steps_leave_the_sum(self) -> None:
        assert torch.equal(merged("wudi", random((3, 4)), steps=0), random((3, 4)).sum(0))

    @pytest.mark.parametrize("solver", ["adam", "closed_form"])
    def test_experts_that_are_the_base_take_no_part(self, solver: str) -> None:
        stack = random((4, 6))
        with_still = torch.cat([stack, torch.zeros(2, 4, 6), torch.full((1, 4, 6), 1e-30)])
        assert_close(merged("wudi", with_still, solver=solver), merged("wudi", stack, solver=solver))


class TestOPCM:
    def test_the_norm_is_the_experts_mean_norm(self) -> None:
        stacks = {"w": random((6, 4)), "b": random((4,), seed=1), "s": random((), seed=2)}
        apply = METHODS["opcm"].function(Stacks.of(stacks))
        found = torch.cat([apply(stack, name=name).flatten() for name, stack in stacks.items()])
        experts = torch.cat([stack.reshape(3, -1) for stack in stacks.values()], dim=1)
        assert_close(found.norm(), experts.norm(dim=1).mean())

    @pytest.mark.parametrize("shape", SHAPES)
    def test_a_repeated_expert_adds_nothing(self, shape: tuple[int, int]) -> None:
        stack = random(shape, tasks=1).expand(3, *shape)
        assert_close(merged("opcm", stack), stack[0])

    @pytest.mark.parametrize("shape", SHAPES)
    def test_what_is_added_leaves_the_leading_block_alone(self, shape: tuple[int, int]) -> None:
        first, second = random(shape, tasks=2)
        found = merged("opcm", torch.stack([first, second]), alpha=0.7)
        u, s, vh = torch.linalg.svd(first)
        inside = u.T @ found @ vh.T
        leading = int((s.cumsum(0) / s.sum() <= 0.7).sum())
        assert leading > 1
        scale = inside[0, 0] / s[0]  # the norm is pinned
        assert_close(inside[:leading, :leading], scale * torch.diag(s[:leading]), rtol=1e-4, atol=1e-5)
        assert_close(inside.diagonal(), scale * s, rtol=1e-4, atol=1e-5)

    def test_embeddings_are_added_up(self) -> None:
        stack = random((4, 3))
        mean_norm = stack.flatten(1).norm(dim=1).mean()
        for name in ["model.embed_tokens.weight", "transformer.wte.weight", "shared.weight"]:
            total = stack.sum(0)
            assert_close(merged("opcm", stack, name=name), mean_norm / total.norm() * total)
            assert not torch.allclose(
                merged("opcm", stack, name=name, others=[]), merged("opcm", stack, name=name)
            )

    def test_experts_arrive_in_the_order_given_or_shuffled_by_a_seed(self) -> None:
        stack = random((4, 3), tasks=4)
        assert not torch.allclose(merged("opcm", stack.flip(0)), merged("opcm", stack))
        order = torch.randperm(4, generator=torch.Generator().manual_seed(7))
        assert torch.equal(merged("opcm", stack, shuffle_seed=7), merged("opcm", stack[order]))

    def test_nothing_is_projected_onto_experts_that_are_the_base(self) -> None:
        stack = torch.cat([torch.zeros(2, 4, 3), random((4, 3), tasks=1)])
        assert_close(merged("opcm", stack), stack[2] / 3)
