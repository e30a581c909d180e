"""Fisher diagonals, against backward passes of single images."""

import pytest
import torch
from small_experts import Setup, random, two_tasks
from torch import Tensor, nn
from torch.testing import assert_close

from adamerge.errors import InputError, NumericError
from adamerge.models import Head


class TestFisher:
    def setup_of(self, module: nn.Module | None = None) -> tuple[Setup, dict[str, Head]]:
        setup = Setup(module or nn.Linear(4, 3), two_tasks(4))
        heads = {"a": Head(random(5, 3), None, False), "b": Head(random(2, 3, seed=1), random(2), False)}
        return setup, heads

    def by_hand(self, setup: Setup, head: Head, task: str) -> dict[str, Tensor]:
        """B5 step 1: one backward pass per image and class, squared before summing."""
        total = {name: torch.zeros_like(p) for name, p in setup.base.items()}
        for image in setup.images[task]:
            for label in range(len(head.weight)):
                leaves = {n: p.clone().requires_grad_() for n, p in setup.experts[task].items()}
                logits = head.logits(torch.func.functional_call(setup.module, leaves, (image[None],)))
                log_p = logits.log_softmax(-1)[0, label]
                log_p.backward()
                for name, leaf in leaves.items():
                    total[name] += log_p.exp().detach() * leaf.grad**2 / len(setup.images[task])
        return total

    @pytest.mark.parametrize("budget", [1, 10**6])
    def test_the_exact_diagonal_is_that_of_single_backward_passes(self, budget: int) -> None:
        setup, heads = self.setup_of(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
        found = setup.statistics(heads, fisher_mode="exact", memory_budget=budget)["fisher"]
        for index, task in enumerate("ab"):
            for name, expected in self.by_hand(setup, heads[task], task).items():
                assert_close(found(name, {})[index], expected)

    def test_sampled_labels_agree_with_the_exact_diagonal_on_average(self) -> None:
        setup, heads = self.setup_of()
        setup.images = {task: images[:1].expand(4000, -1) for task, images in setup.images.items()}
        sampled = setup.statistics(heads, samples=4000, batch_size=1000)["fisher"]
        exact = setup.statistics(heads, samples=1, fisher_mode="exact")["fisher"]
        assert_close(sampled("weight", {}), exact("weight", {}), rtol=0.1, atol=1e-3)

    def test_batch_sqrt_squares_one_gradient_per_batch(self) -> None:
        setup, heads = self.setup_of()
        found = setup.statistics(heads, fisher_mode="batch_sqrt")["fisher"]
        for index, task in enumerate("ab"):
            leaves = {n: p.clone().requires_grad_() for n, p in setup.experts[task].items()}
            features = torch.func.functional_call(setup.module, leaves, (setup.images[task],))
            p = heads[task].logits(features).softmax(-1)
            (p.detach().sqrt() * p.log()).sum().backward()
            for name, leaf in leaves.items():
                assert_close(found(name, {})[index], leaf.grad**2 / len(setup.images[task]))

    def test_a_model_that_cannot_be_batched_is_differentiated_image_by_image(self) -> None:
        class Choosy(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x if x.sum() > 100 else 2 * x)

        setup, heads = self.setup_of(Choosy(4, 3))
        found = setup.statistics(heads, fisher_mode="exact")["fisher"]
        assert_close(found("weight", {})[0], self.by_hand(setup, heads["a"], "a")["weight"])

    def test_the_seed_decides_the_labels(self) -> None:
        setup, heads = self.setup_of()
        one, same, other = (setup.statistics(heads, seed=seed)["fisher"]("bias", {}) for seed in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_a_task_without_head_or_with_infinite_predictions_is_refused(self) -> None:
        setup, heads = self.setup_of()
        with pytest.raises(InputError, match="task 'a' has no head"):
            setup.statistics()["fisher"]("weight", {})
        setup.experts["b"]["weight"].fill_(torch.inf)
        with pytest.raises(NumericError, match="predictions on its own images"):
            setup.statistics(heads)["fisher"]("weight", {})
