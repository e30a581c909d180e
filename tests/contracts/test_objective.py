"""The contract of objectives. A new one subclasses `ObjectiveContract` and gives two methods."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.objectives import (
    Balanced,
    Consistency,
    Entropy,
    FeatureMatching,
    KLTeacher,
    Mixed,
    Objective,
    Perturbed,
    Prior,
    ReliableEntropy,
    RoutingEntropy,
    Supervised,
    TaskIdentity,
)


def logits(n_images: int = 12, n_classes: int = 5, seed: int = 0) -> Tensor:
    """Confident and hesitant predictions."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.2, 9, n_images)[:, None]
    return sharpness * torch.randn(n_images, n_classes, generator=generator)


def probabilities(row: Tensor) -> list[float]:
    powers = [math.exp(x) for x in row.tolist()]
    return [p / sum(powers) for p in powers]


class ObjectiveContract:
    def make(self) -> Objective:
        raise NotImplementedError

    def literal(self, student: Tensor, teacher: Tensor) -> float:
        """Give the loss as its paper writes it, with plain numbers."""
        raise NotImplementedError

    def loss(self, student: Tensor, objective: Objective | None = None) -> Tensor:
        objective = objective or self.make()
        has_teacher = objective.needs_teacher or objective.augments
        loss = objective(student, "cars", logits(seed=1) if has_teacher else None)
        assert loss is not None
        return loss

    def test_it_equals_its_literal_formula(self) -> None:
        assert float(self.loss(logits())) == pytest.approx(self.literal(logits(), logits(seed=1)), rel=1e-5)

    def test_it_is_an_fp32_scalar_with_a_finite_gradient(self) -> None:
        student = logits().requires_grad_()
        loss = self.loss(student)
        loss.backward()
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert torch.isfinite(student.grad).all()
        assert student.grad.abs().sum() > 0

    def test_half_precision_logits_are_widened(self) -> None:
        assert self.loss(logits().bfloat16()).dtype == torch.float32

    def test_saturated_predictions_stay_finite(self) -> None:
        student = (1e4 * logits()).requires_grad_()
        self.loss(student).backward()
        assert torch.isfinite(student.grad).all()

    def test_a_step_depends_on_nothing_but_what_can_be_restored(self) -> None:
        objective = self.make()
        memory = objective.per_task_state()
        first = self.loss(logits(), objective)
        objective.load_per_task_state(memory)
        objective.begin_step()
        assert torch.equal(self.loss(logits(), objective), first)

    def test_what_it_remembers_of_tasks_can_be_restored(self) -> None:
        objective, fresh = self.make(), self.make()
        self.loss(logits(), objective)
        fresh.load_per_task_state(objective.per_task_state())
        assert fresh.per_task_state() == objective.per_task_state()

    def test_recovery_is_told_once_at_most(self) -> None:
        objective = self.make()
        self.loss(1e4 * logits(), objective)
        objective.recovery_due()
        assert not objective.recovery_due()


class OfLogits(ObjectiveContract):
    def test_a_constant_added_to_the_logits_changes_nothing(self) -> None:
        assert_close(self.loss(logits() + 30), self.loss(logits()), rtol=1e-4, atol=1e-5)


def entropy(row: Tensor) -> float:
    return -sum(p * math.log(p) for p in probabilities(row) if p > 0)


class TestEntropy(OfLogits):
    def make(self) -> Objective:
        return Entropy()

    def literal(self, student: Tensor, teacher: Tensor) -> float:
        return sum(map(entropy, student)) / len(student)


class TestEntropyPerLogC(TestEntropy):
    def make(self) -> Objective:
        return Entropy(normalize="log_c")

    def literal(self, student: Tensor, teacher: Tensor) -> float:
        return super().literal(student, teacher) / math.log(5)


class TestReliableEntropy(OfLogits):
    def make(self) -> Objective:
        return ReliableEntropy()

    def literal(self, student: Tensor, teacher: Tensor) -> float:
        reliable = [h for h in map(entropy, student) if h < 0.4 * math.log(5)]
        assert 0 < len(reliable) < len(student)  # the example must exercise the filter
        return sum(reliable) / len(reliable)


class TestKLTeacher(OfLogits):
    def make(self) -> Objective:
        return KLTeacher(temperature=2.0)

    def literal(self, student: Tensor, teacher: Tensor) -> float:
        rows = zip(map(probabilities, teacher / 2), map(probabilities, student / 2), strict=True)
        divergences = [sum(p * math.log(p / q) for p, q in zip(*row, strict=True)) for row in rows]
        return sum(divergences) / len(divergences)


class TestConsistency(TestKLTeacher):
    def make(self) -> Objective:
        return Consistency(temperature=2.0)


class TestPerturbed(TestEntropy):
    def make(self) -> Objective:
        return Perturbed()


class TestSupervised(OfLogits):
    def make(self) -> Objective:
        return Supervised()

    def loss(self, student: Tensor, objective: Objective | None = None) -> Tensor:
        loss = (objective or self.make())(student, "cars", torch.eye(5)[self.labels(student)])
        assert loss is not None
        return loss

    def labels(self, student: Tensor) -> Tensor:
        return torch.arange(len(student)) % 5

    def literal(self, student: Tensor, teacher: Tensor) -> float:
        rows = zip(student, self.labels(student).tolist(), strict=True)
        return sum(-math.log(probabilities(row)[label]) for row, label in rows) / len(student)


class TestTaskIdentity(OfLogits):
    def make(self) -> Objective:
        objective = TaskIdentity()
        objective.build(("aircraft", "birds", "cars", "digits", "eggs"))  # as many as the logits
        return objective

    def literal(self, student: Tensor, teacher: Tensor) -> float:
        return sum(-math.log(probabilities(row)[2]) for row in student) / len(student)


class TestRoutingEntropy(TestEntropy):
    def make(self) -> Objective:
        return RoutingEntropy()


class TestBalanced(OfLogits):
    MEAN = (0.1, 0.4, 0.2, 0.05, 0.25)  # of the steps before

    def make(self) -> Objective:
        objective = Balanced(weight=0.7)
        objective.load_per_task_state({"cars": list(self.MEAN)})
        objective.begin_step()
        return objective

    def literal(self, student: Tensor, teacher: Tensor) -> float:
        rows = list(map(probabilities, student))
        batch = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        spread = -sum(p * math.log(q) for p, q in zip(batch, self.MEAN, strict=True))
        return TestEntropy().literal(student, teacher) - 0.7 * spread


class TestFeatureMatching(ObjectiveContract):
    def make(self) -> Objective:
        return FeatureMatching()

    def literal(self, student: Tensor, teacher: Tensor) -> float:
        pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
        return sum(abs(a - b) for a, b in pairs) / student.numel()


class TestFeatureMatchingOnTheSphere(ObjectiveContract):
    def make(self) -> Objective:
        return FeatureMatching("mse", normalize=True)

    def literal(self, student: Tensor, teacher: Tensor) -> float:
        cosines = [float(a @ b / ((a @ a) * (b @ b)).sqrt()) for a, b in zip(student, teacher, strict=True)]
        return sum(2 - 2 * cosine for cosine in cosines) / student.numel()


class TestPriorBesideEntropy(TestEntropy):
    def make(self) -> Objective:
        return Mixed([Prior(), Entropy()], [9.0, 1.0])  # images cost what entropy says


class TestMixed(OfLogits):
    def make(self) -> Objective:
        return Mixed([Entropy(), ReliableEntropy(), KLTeacher()], [0.5, 1.0, 2.0])

    def literal(self, student: Tensor, teacher: Tensor) -> float:
        terms = [
            kind().literal(student, teacher) for kind in (TestEntropy, TestReliableEntropy, TestKLTeacher)
        ]
        return 0.5 * terms[0] + terms[1] + 2 * terms[2]
