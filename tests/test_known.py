"""What is known of adaptation images beforehand, and what of it a file keeps for the next run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import adapt, make_task, memory_data
from conftest import TASKS
from torch import Tensor

from adamerge import Entropy, KLTeacher, Supervised
from adamerge.errors import AdamergeWarning
from adamerge.fitting import RunCLI, open_vectors
from adamerge.task.known import Known, facts_of
from adamerge.vectors import TaskVectors

HOW: dict[str, Any] = {"eval_batch_size": 256, "device": torch.device("cpu")}


def in_files(clip: Path) -> TaskVectors:
    """Experts of which nothing is stored, and no file was hashed."""
    experts = {task: str(clip / "experts" / f"{task}.safetensors") for task in TASKS}
    return open_vectors(str(clip / "base"), experts, codec="stream")[0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    return tmp_path / "features"


class TestKnown:
    def test_a_batch_takes_its_rows(self) -> None:
        known, rows = Known(), torch.arange(6.0).view(3, 2)
        known.teach("a", lambda: rows)
        known.label("a", torch.tensor([1, 0, 2]), 3)
        known.to(torch.device("cpu"))
        batch = {task: {"index": torch.tensor([2, 0])} for task in ("a", "b")}
        found = known.added_to(batch)
        assert torch.equal(found["a"]["teacher"], rows[[2, 0]])
        assert torch.equal(found["a"]["labels"], torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
        assert set(found["b"]) == set(batch["a"]) == {"index"}

    def test_features_with_facts_are_computed_once(self, cache: Path) -> None:
        calls: list[int] = []

        def compute() -> Tensor:
            calls.append(1)
            return torch.ones(3, 2)

        for facts in (["x"], ["x"], ["y"], None, None):
            known = Known()
            known.teach("a", compute, facts)
            assert torch.equal(known.features["a"], torch.ones(3, 2))
        assert len(calls) == 1 + 1 + 2
        assert len(list(cache.iterdir())) == 2

    @pytest.mark.parametrize("damage", [b"", b"{}", b"\x00"])
    def test_a_damaged_file_is_replaced(self, cache: Path, damage: bytes) -> None:
        Known().teach("a", lambda: torch.ones(3, 2), ["x"])
        (file,) = cache.iterdir()
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b"\x7f" if damage == b"\x00" else damage)
        known = Known()
        with pytest.warns(AdamergeWarning, match="is damaged: it is made again") as warned:
            known.teach("a", lambda: torch.ones(3, 2), ["x"])
        assert len(warned) == 1
        assert torch.equal(known.features["a"], torch.ones(3, 2))
        assert file.read_bytes() == content

    def test_without_a_folder_features_are_in_memory(self, cache: Path) -> None:
        cache.write_text("no folder")
        known = Known()
        with pytest.warns(AdamergeWarning, match="nothing is kept in") as warned:
            known.teach("a", lambda: torch.ones(3, 2), ["x"])
        assert len(warned) == 1
        known.teach("b", lambda: torch.ones(3, 2), ["x"])
        assert torch.equal(known.features["a"], torch.ones(3, 2))


def test_a_second_run_asks_no_expert(clip: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def task() -> Any:
        made = make_task(clip, objective=KLTeacher())
        made.experts = in_files(clip).stored("stream")
        return made

    plain = adapt(make_task(clip, objective=KLTeacher()), memory_data(), 2)
    assert not cache.exists()
    first = adapt(task(), memory_data(), 2)
    assert len(list(cache.iterdir())) == len(TASKS)
    second = task()
    monkeypatch.setattr(second, "expert_features", lambda *_: pytest.fail("the features are in files"))
    assert torch.equal(adapt(second, memory_data(), 2), first)
    assert torch.equal(first, plain)


def test_facts_tell_experts_images_and_preprocessing_apart(clip: Path) -> None:
    data, task = memory_data(), make_task(clip)
    vectors, backbone = in_files(clip).stored("stream"), task.backbone
    images, others = data.adaptation(TASKS[0]), data.adaptation(TASKS[1])
    found = [
        facts_of(vectors, TASKS[0], backbone, images, **HOW),
        facts_of(vectors, TASKS[1], backbone, images, **HOW),
        facts_of(vectors, TASKS[0], backbone, others, **HOW),
    ]
    assert None not in found
    assert len(set(map(str, found))) == 3
    assert found[0] == facts_of(in_files(clip).stored("stream"), TASKS[0], backbone, images, **HOW)
    edited = vectors.edit(lambda _, stack: stack / 2)
    for unknown in (edited, task.vectors, in_files(clip)):
        assert facts_of(unknown, TASKS[0], backbone, images, **HOW) is None
    backbone.transform_key = ""
    assert facts_of(vectors, TASKS[0], backbone, images, **HOW) is None


@pytest.mark.parametrize(("objective", "labelled"), [(Supervised, True), (Entropy, False)])
def test_inputs_of_a_run_name_the_labels_that_it_learns_on(
    clip: Path, monkeypatch: pytest.MonkeyPatch, objective: Any, labelled: bool
) -> None:
    data, task = memory_data(), make_task(clip, objective=objective())
    asked: list[bool] = []
    monkeypatch.setattr(data, "fingerprint", lambda *, labelled: asked.append(labelled) or {})
    settings = SimpleNamespace(model=SimpleNamespace(base=str(clip / "base"), experts={}))
    run = SimpleNamespace(model=task, datamodule=data, _resolved="{}", settings=settings)
    assert RunCLI._inputs(run)["data"] == {}  # type: ignore[arg-type]  # what it reads of a run
    assert asked == [labelled]


def test_features_of_another_batch_size_thread_count_or_device_are_others(clip: Path, cache: Path) -> None:
    vectors, data = in_files(clip).stored("stream"), memory_data()
    backbone = make_task(clip).backbone
    images = data.adaptation(TASKS[0])
    found = [facts_of(vectors, TASKS[0], backbone, images, **HOW)]
    found += [
        facts_of(vectors, TASKS[0], backbone, images, **(HOW | change))
        for change in ({"eval_batch_size": 3}, {"device": torch.device("meta")})
    ]
    torch.set_num_threads(2)
    try:
        found.append(facts_of(vectors, TASKS[0], backbone, images, **HOW))
    finally:
        torch.set_num_threads(1)
    assert None not in found
    assert len({str(facts) for facts in found}) == len(found)
