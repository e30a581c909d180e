"""What single objectives promise beyond their contract, and sharpness-aware steps."""

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.objectives import (
    Entropy,
    FeatureMatching,
    KLTeacher,
    Prior,
    ReliableEntropy,
    SharpnessAware,
    Supervised,
    entropy_of,
)

CONFIDENT, HESITANT = [9.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("n_classes", [2, 10, 397])
def test_a_uniform_prediction_has_the_entropy_log_c(n_classes: int) -> None:
    assert entropy_of(torch.zeros(1, n_classes)).item() == pytest.approx(math.log(n_classes))
    assert Entropy("log_c")(torch.zeros(3, n_classes), "task").item() == pytest.approx(1)


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    logits = torch.tensor([CONFIDENT, HESITANT])
    assert KLTeacher()(logits, "task", logits + 5).item() == pytest.approx(0, abs=1e-6)


def test_teachers_are_asked_only_where_they_are_needed() -> None:
    assert KLTeacher.needs_teacher
    assert not Entropy.needs_teacher
    with pytest.raises(InputError, match="needs the expert's logits of task 'cars'"):
        KLTeacher()(torch.zeros(1, 2), "cars")
    assert FeatureMatching.needs_teacher
    with pytest.raises(InputError, match="needs the expert's features of task 'cars'"):
        FeatureMatching()(torch.zeros(1, 2), "cars")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(
        InputError, match=r"temperature=.* is (out of range|not finite).\nUse a number in \[1e-4, 1e4\]"
    ):
        KLTeacher(temperature)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_normalisation_is_refused() -> None:
    with pytest.raises(InputError, match="normalize='c' is unknown"):
        Entropy("c")


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(InputError, match="distance='l2' is unknown"):
        FeatureMatching("l2")


def test_on_the_sphere_lengths_do_not_matter() -> None:
    features = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert FeatureMatching(normalize=True)(7 * features, "cars", features).item() == pytest.approx(0)
    assert FeatureMatching()(7 * features, "cars", features).item() == pytest.approx(6 * 9 / 4)


def test_a_prior_pulls_every_parameter_to_its_start() -> None:
    prior = Prior()
    assert prior.penalty([]) is None
    parameter = nn.Parameter(torch.tensor([[0.3, 0.3]]))
    prior.start_at([parameter])
    with torch.no_grad():
        parameter += torch.tensor([[0.5, -1.0]])
    penalty = prior.penalty([parameter])
    penalty.backward()
    assert penalty.item() == pytest.approx(0.25 + 1)
    assert_close(parameter.grad, torch.tensor([[1.0, -2.0]]))


class TestReliableEntropy:
    @pytest.mark.parametrize("options", [{"threshold": -1.0}, {"threshold": math.nan}, {"recovery": -0.1}])
    def test_options_out_of_range_are_refused(self, options: dict) -> None:
        with pytest.raises(InputError, match=f"{next(iter(options))}=.* is (out of range|not finite)"):
            ReliableEntropy(**options)

    def test_an_infinite_threshold_is_plain_entropy(self) -> None:
        logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
        assert torch.equal(ReliableEntropy(math.inf)(logits, "task"), Entropy()(logits, "task"))

    def test_without_a_reliable_image_the_task_is_skipped_and_nothing_remembered(self) -> None:
        objective = ReliableEntropy()
        assert objective(torch.tensor([HESITANT]), "task") is None
        assert objective.per_task_state() == {}

    def test_images_keep_their_fate_within_a_step_and_lose_it_after(self) -> None:
        objective = ReliableEntropy()
        objective(torch.tensor([CONFIDENT, HESITANT]), "task")
        assert objective(torch.tensor([HESITANT, CONFIDENT]), "task") is None
        objective.begin_step()
        assert objective(torch.tensor([HESITANT, CONFIDENT]), "task") is not None

    def test_tasks_are_averaged_and_recover_apart(self) -> None:
        objective = ReliableEntropy(threshold=0.4, recovery=0.1)
        certain, fair = torch.tensor([CONFIDENT]), torch.tensor([[3.5, 0.0, 0.0, 0.0]])
        objective(fair, "cars")
        assert not objective.recovery_due()
        objective(certain, "digits")
        assert set(objective.per_task_state()) == {"cars", "digits"}
        assert objective.recovery_due()
        objective.forget()
        assert objective.per_task_state() == {}
        assert not objective.recovery_due()

    def test_a_second_pass_above_the_threshold_takes_the_alarm_back(self) -> None:
        objective = ReliableEntropy(threshold=1.0, recovery=0.1)
        objective(torch.tensor([CONFIDENT]), "task")
        objective(torch.tensor([HESITANT]), "task")
        assert not objective.recovery_due()

    def test_recovery_can_be_turned_off(self) -> None:
        objective = ReliableEntropy(recovery=0.0)
        objective(torch.tensor([[99.0, 0.0]]), "task")
        assert not objective.recovery_due()

    def test_a_loss_that_is_not_finite_is_not_remembered(self) -> None:
        objective = ReliableEntropy()
        objective._remember("task", math.nan, 1.0)
        assert objective.per_task_state() == {}


class TestSharpnessAware:
    def optimizer(self, w: nn.Parameter, **options: float) -> SharpnessAware:
        return SharpnessAware([w], lambda groups: torch.optim.Adam(groups, lr=0.1), **options)

    def step(self, optimizer: SharpnessAware, w: nn.Parameter) -> list[Tensor]:
        """Step on a quadratic; give the places where its gradient was taken."""
        places = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            places.append(w.detach().clone())
            loss = (w * torch.tensor([1.0, 4.0]) * w).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return places

    def test_the_second_pass_is_rho_away_and_the_step_starts_from_the_first(self) -> None:
        w = nn.Parameter(torch.tensor([0.3, -0.2]))
        before, there = self.step(self.optimizer(w, rho=0.05), w)
        assert (there - before).norm().item() == pytest.approx(0.05, rel=1e-4)
        assert (w - before).abs().tolist() == pytest.approx([0.1, 0.1], rel=1e-3)  # Adam's first step is lr

    def test_without_ascent_it_is_the_base_optimizer(self) -> None:
        w, plain = (nn.Parameter(torch.tensor([0.3, -0.2])) for _ in range(2))
        adam = torch.optim.Adam([plain], lr=0.1)
        optimizer = self.optimizer(w, rho=0.0)
        for _ in range(3):
            self.step(optimizer, w)
            adam.zero_grad()
            (plain * torch.tensor([1.0, 4.0]) * plain).sum().backward()
            adam.step()
        assert torch.equal(w, plain)

    def test_a_coefficient_of_zero_is_never_perturbed_adaptively(self) -> None:
        w = nn.Parameter(torch.tensor([0.3, 0.0]))
        before, there = self.step(self.optimizer(w, rho=0.5, adaptive=True), w)
        assert there[1] == before[1] == 0
        assert there[0] != before[0]

    def test_an_error_in_the_second_pass_leaves_the_coefficients(self) -> None:
        w = nn.Parameter(torch.tensor([0.3, -0.2]))
        optimizer, calls = self.optimizer(w), []

        def closure() -> Tensor:
            calls.append(1)
            if len(calls) == 2:
                raise FloatingPointError("second pass")
            w.square().sum().backward()
            return w.sum()

        with pytest.raises(FloatingPointError):
            optimizer.step(closure)
        assert torch.equal(w, torch.tensor([0.3, -0.2]))

    def test_without_any_gradient_nothing_moves(self) -> None:
        w = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.optimizer(w).step(lambda: torch.zeros(()))
        assert torch.equal(w, torch.tensor([0.3, -0.2]))

    def test_its_state_is_the_base_optimizers_and_can_be_restored(self) -> None:
        w, other = (nn.Parameter(torch.tensor([0.3, -0.2])) for _ in range(2))
        first, second = self.optimizer(w), self.optimizer(other)
        self.step(first, w)
        second.load_state_dict(deepcopy(first.state_dict()))
        with torch.no_grad():
            other.copy_(w)
        self.step(first, w)
        self.step(second, other)
        assert torch.equal(w, other)
        assert second.state is second.base.state
        assert second.param_groups is second.base.param_groups

    def test_wrong_uses_are_refused(self) -> None:
        w = nn.Parameter(torch.zeros(1))
        with pytest.raises(InputError, match=r"rho=-1.0 is out of range"):
            self.optimizer(w, rho=-1.0)
        with pytest.raises(
            InputError, match="needs a closure .*\nIt cannot be used with precision '16-mixed'"
        ):
            self.optimizer(w).step()


class TestSupervised:
    def test_an_error_rate_counts_wrong_classes(self) -> None:
        labels = torch.eye(2)[torch.tensor([0, 1, 1, 1])]
        found = Supervised("error_rate")(torch.tensor([[2.0, 0.0]] * 3 + [[0.0, 2.0]]), "task", labels)
        assert float(found) == 0.5

    def test_without_labels_it_says_so(self) -> None:
        with pytest.raises(InputError, match="needs the labels of task 'task'"):
            Supervised()(torch.zeros(2, 2), "task")

    def test_another_score_is_refused(self, unchecked: None) -> None:
        with pytest.raises(InputError, match="score='f1'"):
            Supervised("f1")
