"""Objectives of a router's logits, and sums of objectives."""

import math

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.objectives import (
    Balanced,
    Entropy,
    FeatureMatching,
    KLTeacher,
    Mixed,
    Objective,
    Prior,
    ReliableEntropy,
    RoutingEntropy,
    TaskIdentity,
)

TASKS = ("cars", "digits", "textures")


def draw(n_columns: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(6, n_columns, generator=torch.Generator().manual_seed(seed))


PREDICTION, TEACHER, ROUTING = draw(5), draw(5, seed=1), draw(3, seed=2)


def built(objective: Objective) -> Objective:
    objective.build(TASKS)
    return objective


class TestTaskIdentity:
    def test_it_is_the_cross_entropy_of_the_task(self) -> None:
        logits = torch.tensor([[0.0, math.log(2), 0.0], [0.0, 0.0, math.log(6)]])
        loss = built(TaskIdentity())(logits, "digits")
        assert float(loss) == pytest.approx((math.log(4 / 2) + math.log(8)) / 2)

    def test_descending_it_leads_to_the_task(self) -> None:
        logits = torch.zeros(2, 3, requires_grad=True)
        built(TaskIdentity())(logits, "textures").backward()
        assert (-logits.grad).argmax(-1).tolist() == [2, 2]

    def test_it_reads_the_router(self) -> None:
        assert TaskIdentity.reads == RoutingEntropy.reads == "routing"
        assert TaskIdentity().needs_router
        assert Entropy.reads == KLTeacher.reads == "prediction"
        assert not Entropy().needs_router

    def test_a_task_without_an_expert_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"no task 'signs'.\nIt chooses among \['cars', 'digits'"):
            built(TaskIdentity())(ROUTING, "signs")


class TestMixed:
    def test_it_is_the_weighted_sum_of_what_each_part_reads(self) -> None:
        mixed = built(Mixed([Entropy(), KLTeacher(), TaskIdentity()], [0.5, 2.0, 0.25]))
        expected = 0.5 * Entropy()(PREDICTION, "cars") + 2 * KLTeacher()(PREDICTION, "cars", TEACHER)
        expected = expected + 0.25 * built(TaskIdentity())(ROUTING, "cars")
        seen = {"prediction": PREDICTION, "routing": ROUTING}
        assert_close(mixed.loss(seen, "cars", {"prediction": TEACHER}), expected)

    def test_features_can_be_read_beside_predictions(self) -> None:
        mixed = Mixed([Entropy(), FeatureMatching()], [1.0, 3.0])
        seen, teacher = {"prediction": PREDICTION, "features": ROUTING}, {"features": ROUTING + 0.5}
        assert_close(mixed.loss(seen, "cars", teacher), Entropy()(PREDICTION, "cars") + 1.5)
        assert Mixed([FeatureMatching(), Prior()]).reads == "features"
        with pytest.raises(InputError, match=r"FeatureMatching needs a model's features, found \['predict"):
            mixed(PREDICTION, "cars")

    def test_weights_are_one_unless_given(self) -> None:
        loss = Mixed([Entropy(), Entropy()])(PREDICTION, "cars")
        assert_close(loss, 2 * Entropy()(PREDICTION, "cars"))

    def test_it_needs_what_its_parts_need(self) -> None:
        assert Mixed([Entropy(), KLTeacher()]).needs_teacher
        assert not Mixed([Entropy()]).needs_teacher
        assert Mixed([Entropy(), TaskIdentity()]).needs_router
        assert not Mixed([Entropy()]).needs_router

    def test_without_a_prediction_to_read_it_reads_the_router(self) -> None:
        mixed = built(Mixed([TaskIdentity(), RoutingEntropy()]))
        assert mixed.reads == "routing"
        expected = built(TaskIdentity())(ROUTING, "cars") + Entropy()(ROUTING, "cars")
        assert_close(mixed(ROUTING, "cars"), expected)
        assert Mixed([TaskIdentity(), Entropy()]).reads == "prediction"

    def test_a_part_without_its_router_is_refused(self) -> None:
        with pytest.raises(InputError, match="TaskIdentity needs a router"):
            built(Mixed([Entropy(), TaskIdentity()]))(PREDICTION, "cars")

    def test_a_part_that_is_not_worth_a_step_is_left_out(self) -> None:
        hesitant = torch.zeros(4, 5)
        assert_close(Mixed([ReliableEntropy(), Entropy()])(hesitant, "cars"), Entropy()(hesitant, "cars"))
        assert Mixed([ReliableEntropy()])(hesitant, "cars") is None

    def test_steps_memory_and_recovery_are_its_parts(self) -> None:
        part = ReliableEntropy(recovery=0.1)
        mixed = Mixed([Entropy(), part])
        mixed(1e3 * PREDICTION, "cars")
        assert mixed.per_task_state() == {"cars": [None, part.per_task_state()["cars"]]}
        assert part._kept
        mixed.begin_step()
        assert not part._kept
        assert mixed.recovery_due()
        assert not mixed.recovery_due()
        mixed.forget()
        assert part.per_task_state() == {}
        mixed.load_per_task_state({"cars": [None, 0.5]})
        assert part.per_task_state() == {"cars": 0.5}

    def test_several_parts_may_remember(self) -> None:
        mixed, fresh = (Mixed([Balanced(), ReliableEntropy(threshold=0.5)]) for _ in range(2))
        mixed(9 * PREDICTION, "cars")
        mixed(torch.zeros(4, 5), "digits")  # nothing reliable here
        fresh.load_per_task_state(mixed.per_task_state())
        assert [set(part.per_task_state()) for part in fresh.parts] == [{"cars", "digits"}, {"cars"}]
        assert fresh.per_task_state() == mixed.per_task_state()

    def test_penalties_are_weighted_too(self) -> None:
        parameters = [torch.zeros(2, 3), torch.ones(2)]
        mixed = Mixed([Entropy(), Prior()], [1.0, 0.5])
        mixed.start_at(parameters)
        moved = [parameter + 2 for parameter in parameters]
        assert mixed.penalty(moved).item() == pytest.approx(0.5 * 8 * 4)
        assert Mixed([Entropy()]).penalty(moved) is None

    def test_yaml_gives_parts_and_weights(self) -> None:
        parser = ArgumentParser()
        parser.add_argument("--objective", type=Objective)
        parts = [
            {"class_path": "TaskIdentity"},
            {"class_path": "KLTeacher", "init_args": {"temperature": 3.0}},
        ]
        options = {"parts": parts, "weights": [1.0, 0.1]}
        parsed = parser.parse_object({"objective": {"class_path": "Mixed", "init_args": options}})
        mixed = parser.instantiate_classes(parsed).objective
        assert [type(part) for part in mixed.parts] == [TaskIdentity, KLTeacher]
        assert mixed.weights == [1.0, 0.1]

    @pytest.mark.parametrize(
        ("parts", "weights", "message"),
        [
            ([], None, "needs a flat list"),
            ([Mixed([Entropy()])], None, "needs a flat list"),
            ([Entropy()], [1.0, 2.0], r"weights=\[1.0, 2.0\] are not 1 numbers"),
            ([Entropy()], [math.nan], r"weights=\[nan\] has the wrong type.\nUse a list, each a number"),
        ],
    )
    def test_sums_that_cannot_work_are_refused(
        self, parts: list[Objective], weights: list[float] | None, message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            Mixed(parts, weights)
