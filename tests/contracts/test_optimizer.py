"""The contract of optimizers inside MergeTask: a new one gives `OptimizerContract` one method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import adapt, make_task, make_trainer, memory_data
from conftest import TASKS
from torch import Tensor

from adamerge import (
    CMAES,
    Entropy,
    FrankWolfe,
    InputError,
    KLTeacher,
    Learned,
    MergeTask,
    NaturalGradient,
    RandomSearch,
    Router,
    SharpnessAware,
)
from adamerge.coefficients import Coefficients
from adamerge.errors import AdamergeWarning
from adamerge.objectives import Objective
from adamerge.optimizers import CoefficientOptimizer


class OptimizerContract:
    objective: type[Objective] = Entropy

    def make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        raise NotImplementedError

    def task(self, clip: Path, coefficients: Coefficients | None = None) -> MergeTask:
        return make_task(clip, coefficients, objective=self.objective(), optimizer=self.make)

    @pytest.mark.parametrize("grouping", ["task", "tensor", "block"])
    def test_it_steps_on_every_grouping(self, clip: Path, grouping: Any) -> None:
        learned = adapt(self.task(clip, Learned(grouping=grouping)), memory_data(), 2)
        assert torch.isfinite(learned).all()
        assert not torch.equal(learned, torch.full_like(learned, 0.3))

    def test_the_same_seed_gives_the_same_coefficients(self, clip: Path) -> None:
        a, b = (adapt(self.task(clip), memory_data(), 3) for _ in range(2))
        assert torch.equal(a, b)

    def test_an_interrupted_run_goes_on_bit_for_bit(self, clip: Path, tmp_path: Path) -> None:
        whole = adapt(self.task(clip), memory_data(), 5)
        trainer = make_trainer(2, max_epochs=-1)
        trainer.fit(self.task(clip), datamodule=memory_data())
        trainer.save_checkpoint(tmp_path / "step2.ckpt")
        resumed = self.task(clip)
        trainer, checkpoint = make_trainer(5, max_epochs=-1), tmp_path / "step2.ckpt"
        trainer.fit(resumed, datamodule=memory_data(), ckpt_path=checkpoint)
        assert torch.equal(resumed.coefficients.table()[1], whole)

    def test_nothing_moves_where_no_task_is_worth_a_step(self, clip: Path) -> None:
        class Indifferent(Entropy):
            def forward(self, logits: Tensor, task: str, teacher: Tensor | None = None) -> None:
                return None

        task = make_task(clip, objective=Indifferent(), optimizer=self.make)
        if self.reads() == "loss":
            with pytest.raises(InputError, match="cannot be compared"):
                adapt(task, memory_data(), 1)
            return
        with pytest.warns(AdamergeWarning, match="Indifferent found no image worth a step"):
            learned = adapt(task, memory_data(), 2)
        assert torch.equal(learned, torch.full_like(learned, 0.3))

    def test_a_router_is_refused_where_only_a_matrix_will_do(self, clip: Path) -> None:
        task = self.task(clip, Router())
        if self.reads() is None:
            adapt(task, memory_data(), 1)
            return
        with pytest.raises(InputError, match="a router has none"):
            adapt(task, memory_data(), 1)

    def reads(self) -> str | None:
        """Tell what a `CoefficientOptimizer` reads; None for others."""
        made = self.make([torch.nn.Parameter(torch.zeros(len(TASKS), 2))])
        return made.reads if isinstance(made, CoefficientOptimizer) else None


class TestAdam(OptimizerContract):
    def make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-2)


class TestSharpnessAware(OptimizerContract):
    objective = KLTeacher

    def make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return SharpnessAware(parameters, rho=0.05)


class TestFrankWolfe(OptimizerContract):
    def make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return FrankWolfe(parameters, lr=0.5)


class TestSoftFrankWolfe(OptimizerContract):
    objective = KLTeacher

    def make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return FrankWolfe(parameters, lr=0.5, soft=True, granularity="task", direction="cosine")


class TestCMAES(OptimizerContract):
    def make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return CMAES(parameters, population=4)


class TestRandomSearch(OptimizerContract):
    def make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return RandomSearch(parameters, population=4, keep="best")


class TestNaturalGradient(OptimizerContract):
    objective = KLTeacher

    def make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return NaturalGradient(parameters)
