"""Statistics of experts: what is computed when, what is kept, and what is refused."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from small_experts import Setup, mlp, random, two_tasks
from torch.testing import assert_close

from adamerge.errors import DataError, InputError
from adamerge.models import Head
from adamerge.static import Statistic


class TestWhatIsComputedWhen:
    def test_they_are_the_statistics_that_methods_ask_for(self) -> None:
        statistics = Setup(mlp(), two_tasks(6)).statistics()
        assert set(statistics) == {"blocks", "fisher", "gram", "prefix_gram"}
        assert len(statistics) == 4
        assert all(isinstance(statistic, Statistic) for statistic in statistics.values())
        assert statistics.tasks == ("a", "b")

    def test_nothing_is_computed_before_it_is_asked_for(self) -> None:
        setup = Setup(mlp(), two_tasks(6))
        assert setup.statistics()["gram"]
        assert setup.backbone.calls == 0

    @pytest.mark.parametrize(("budget", "walks"), [(10**6, 1), (4 * (36 + 25), 2), (1, 3)])
    def test_the_budget_decides_how_often_the_images_are_walked(self, budget: int, walks: int) -> None:
        setup = Setup(mlp(), two_tasks(6))
        found = setup.statistics(memory_budget=budget)["gram"]
        matrices = [found(name, {}) for name in found.order]
        assert setup.backbone.calls == 1 + 2 * walks
        assert_close(matrices, [setup.statistics()["gram"](name, {}) for name in found.order])

    @pytest.mark.parametrize("kind", ["gram", "fisher"])
    def test_what_a_cache_holds_needs_neither_images_nor_weights(self, tmp_path: Path, kind: str) -> None:
        setup = Setup(mlp(), two_tasks(6))
        head = Head(random(2, 3), None, False)
        options = {"cache": tmp_path / "cache", "keys": {"a": "1", "b": "2"}, "heads": {"a": head, "b": head}}
        first = setup.statistics(**options)[kind]
        expected = {name: first(name, {}) for name in first.order}
        calls = setup.backbone.calls
        setup.images, setup.experts = dict.fromkeys("ab", lambda: pytest.fail("read")), {}
        second = setup.statistics(**options)[kind]
        assert_close({name: second(name, {}) for name in second.order}, expected)
        assert setup.backbone.calls == calls

    @pytest.mark.parametrize(
        "change", [{"keys": {"a": "1", "b": "3"}}, {"samples": 5}, {"seed": 1}, {"batch_size": 3}]
    )
    def test_a_cache_of_something_else_is_not_used(self, tmp_path: Path, change: dict[str, object]) -> None:
        setup = Setup(mlp(), two_tasks(6))
        options: dict[str, Any] = {"cache": tmp_path, "keys": {"a": "1", "b": "2"}}
        setup.statistics(**options)["gram"]("0.weight", {})
        calls = setup.backbone.calls
        setup.statistics(**options | change)["gram"]("0.weight", {})
        assert setup.backbone.calls > calls

    def test_without_a_cache_the_files_go_with_the_statistics(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        found = Setup(mlp(), two_tasks(6)).statistics()["gram"]
        assert found("0.weight", {}) is not None
        assert list(tmp_path.rglob("gram-*.safetensors"))
        del found
        gc.collect()
        assert not list(tmp_path.iterdir())

    def test_samples_are_drawn_from_all_images(self) -> None:
        """The first images of a folder are often all of one class."""
        images = {"a": torch.eye(6).repeat_interleave(50, 0), "b": torch.eye(6)}
        found = Setup(mlp(), images).statistics(samples=60)["gram"]("0.weight", {})
        assert found[0].diagonal().min() > 0
        assert found[0].trace() == pytest.approx(1)
        assert_close(found[1], torch.eye(6) / 6)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"samples": 0}, "samples=0 is not positive."),
            ({"batch_size": -1}, "batch_size=-1 is not positive."),
            ({"memory_budget": 0}, "memory_budget=0 is not positive."),
            ({"fisher_mode": "full"}, "fisher_mode='full' is unknown.\nUse one of exact, sampled_label,"),
            ({"cache": "here", "keys": {"a": "1"}}, "a cache was given, but no key of b.\nPass keys="),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_wrong_options_are_refused(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(InputError) as caught:
            Setup(mlp(), two_tasks(6)).statistics(**options)
        assert str(caught.value).startswith(message)

    def test_a_task_without_images_is_refused(self) -> None:
        setup = Setup(mlp(), {"a": torch.zeros(0, 6)})
        with pytest.raises(DataError, match="task 'a' has no images"):
            setup.statistics()["gram"]("0.weight", {})

    def test_an_expert_that_lacks_tensors_is_refused(self) -> None:
        setup = Setup(mlp(), two_tasks(6))
        del setup.experts["a"]["2.weight"]
        with pytest.raises(InputError, match="expert 'a' lacks 1 tensors that the model reads: 2.weight"):
            setup.statistics()["gram"]("0.weight", {})
