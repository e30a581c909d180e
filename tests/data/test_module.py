"""The data module: parts, loaders, labels that stay out, and images seen twice."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CLASSES, TASKS

from adamerge.data import module
from adamerge.data.module import MultiTaskData
from adamerge.data.tasks import TaskSpec
from adamerge.errors import AdamergeWarning, DataError, InputError
from adamerge.models import OpenClipBackbone

Rows = dict[str, dict[str, Any]]
Make = Callable[..., MultiTaskData]


@pytest.fixture
def make(clip: Path, rows: Rows) -> Make:
    """Give a function from changed rows and options to a data module."""

    def make(changes: Rows | None = None, **options: Any) -> MultiTaskData:
        specs = {t: TaskSpec(**(row | (changes or {}).get(t, {}))) for t, row in rows.items()}
        data = MultiTaskData(specs, **({"batch_size": 4} | options))
        data.preprocess = OpenClipBackbone(clip / "base").preprocess
        return data

    return make


def test_batches_hold_images_and_their_places_and_no_labels(make: Make) -> None:
    data = make()
    batch, _, _ = next(iter(data.train_dataloader()))
    assert list(batch) == list(TASKS)
    for task, part in batch.items():
        assert set(part) == {"images", "index"}
        assert torch.equal(part["images"], data.adaptation(task).images[part["index"]])


def test_held_out_images_are_disjoint_from_those_adapted_on(make: Make) -> None:
    data = make(holdout=0.25)
    for task in TASKS:
        adapted, held = data.adaptation(task), data.held_out(task)
        assert (len(adapted), len(held)) == (9, 3)
        assert not set(adapted.digests()) & set(held.digests())
        assert adapted.labels is None
        assert held.labels is None


def test_without_a_holdout_all_images_serve_both(make: Make) -> None:
    data = make(holdout=0.0)
    assert len(data.adaptation("bars")) == len(data.held_out("bars")) == 12


def test_in_the_given_order_a_stream_of_a_sorted_source_has_batches_of_one_class(make: Make) -> None:
    data = make(order="given", holdout=0.25)
    batches = images_of(data.train_dataloader(), 3)
    assert torch.equal(torch.cat(batches)[:9], data.adaptation("circles").images)
    labels = data.adaptation_labels("circles")
    assert torch.equal(labels, labels.sort().values)
    shuffled = images_of(make(holdout=0.25).train_dataloader(), 3)
    assert not torch.equal(torch.cat(batches), torch.cat(shuffled))
    held = [module.held_out("circles").digests() for module in (data, make(holdout=0.25))]
    assert held[0] == held[1]


def test_an_unknown_order_names_the_nearest(make: Make, unchecked: None) -> None:
    with pytest.raises(InputError, match="order='shufled' is unknown.\nDid you mean 'shuffled'"):
        make(order="shufled")


def test_a_task_may_have_batches_of_its_own_size(make: Make) -> None:
    data = make({"bars": {"batch_size": 6}})
    batch, _, _ = next(iter(data.train_dataloader()))
    assert {task: len(part["index"]) for task, part in batch.items()} == {"circles": 4, "bars": 6, "dots": 4}
    with pytest.warns(AdamergeWarning, match="single images collapses"):
        make({"bars": {"batch_size": 1}})


def test_adaptation_images_alone_can_be_corrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    load = module.load_images
    monkeypatch.setattr(
        module,
        "load_images",
        lambda *args, **options: asked.append(options.pop("corruption")) or load(*args, **options),
    )
    data = make({"bars": {"adapt_corruption": "contrast/3", "corruption": "spatter"}})
    for task in ("bars", "dots"):
        data.adaptation(task), data.adaptation_labels(task), data.test(task)
    assert asked == ["contrast/3", "contrast/3", "spatter", None, None, None]


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_shots_are_a_part_of_the_adaptation_images_that_the_seed_chooses(make: Make, holdout: float) -> None:
    few, others, whole = (
        make(shots=5, holdout=holdout),
        make(shots=5, holdout=holdout, seed=1),
        make(holdout=0.0),
    )
    chosen, all_of_them = set(few.adaptation("bars").digests()), set(whole.adaptation("bars").digests())
    assert len(few.adaptation("bars")) == 5
    assert chosen < all_of_them
    assert chosen != set(others.adaptation("bars").digests())
    assert len(few.held_out("bars")) == (3 if holdout else 5)


def test_labels_of_adaptation_images_are_those_of_the_shots(make: Make) -> None:
    data = make(shots=5, holdout=0.25)
    every = data._images("bars", "labelled adaptation", data.tasks["bars"].adapt, labelled=True)
    label_of = dict(zip(every.digests(), every.labels.tolist(), strict=True))
    expected = [label_of[digest] for digest in data.adaptation("bars").digests()]
    assert data.adaptation_labels("bars").tolist() == expected
    assert len(set(expected)) > 1


def test_labels_of_other_classes_are_refused(make: Make) -> None:
    data = make({"bars": {"classes": ["flat", "steep"]}})
    with pytest.raises(DataError, match="its adaptation images have 3"):
        data.adaptation_labels("bars")


def images_of(loader: Any, steps: int) -> list[torch.Tensor]:
    return [batch["circles"]["images"] for batch, _, _ in islice(loader, steps)]


def test_the_stream_does_not_depend_on_workers(make: Make) -> None:
    alone, helped = (images_of(make(num_workers=n).train_dataloader(), 3) for n in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_a_resumed_stream_goes_on_where_it_was(make: Make) -> None:
    before, after = make(), make()
    after.load_state_dict({"step": 2})
    assert after.state_dict() == {"step": 2}
    expected = images_of(before.train_dataloader(), 4)[2:]
    assert all(
        torch.equal(a, b) for a, b in zip(images_of(after.train_dataloader(), 2), expected, strict=True)
    )


def test_a_task_with_fewer_images_than_a_batch_is_warned_of_and_used(make: Make) -> None:
    data = make(batch_size=11)
    with pytest.warns(AdamergeWarning) as caught:
        (images,) = images_of(data.train_dataloader(), 1)
    assert [str(w.message) for w in caught if w.category is AdamergeWarning] == [
        f"task {task!r} has 10 adaptation images, fewer than a batch of 11: some come twice in a step."
        for task in TASKS
    ]
    assert len(images) == 11


def test_evaluation_walks_every_image_once_in_order(make: Make) -> None:
    data = make(eval_batch_size=4)
    assert data.tested_tasks == TASKS
    for task, loader in zip(TASKS, data.test_dataloader(), strict=True):
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [4, 4, 1]
        assert torch.equal(torch.cat([b["images"] for b in batches]), data.test(task).images)
        assert torch.cat([b["labels"] for b in batches]).unique().tolist() == list(range(len(CLASSES[task])))
    for task, loader in zip(TASKS, data.val_dataloader(), strict=True):
        assert torch.equal(torch.cat([b["images"] for b in loader]), data.held_out(task).images)


def test_predictions_are_of_test_images_or_else_of_adaptation_images(make: Make) -> None:
    data = make({"dots": {"test": None}})
    assert data.tested_tasks == ("circles", "bars")
    assert [sum(len(b["index"]) for b in loader) for loader in data.predict_dataloader()] == [9, 9, 12]
    with pytest.raises(InputError, match="'dots', test images: none were given.\nSet data.tasks.dots.test"):
        data.test("dots")


def test_test_images_that_adaptation_saw_are_counted(make: Make, rows: Rows) -> None:
    data = make({"bars": {"test": rows["bars"]["adapt"]}})
    assert data.transductive() == {"circles": 0, "bars": 12, "dots": 0}


def test_the_fingerprint_follows_the_images(make: Make, rows: Rows) -> None:
    same = make().fingerprint()
    assert make().fingerprint() == same
    for part, source in (("adapt", "test"), ("test", "adapt")):
        other = make({"bars": {part: rows["bars"][source]}}).fingerprint()
        name = {"adapt": "adaptation", "test": "test"}[part]
        assert [key for key in same if same[key] != other[key]] == [f"bars {name}"]


def test_the_fingerprint_follows_the_labels_of_test_images_alone(make: Make) -> None:
    data = make()
    before = data.fingerprint()
    data.test("dots").labels[3] ^= 1
    after = data.fingerprint()
    assert [key for key in before if before[key] != after[key]] == ["dots test"]


def test_the_fingerprint_has_labels_of_adaptation_images_where_they_are_asked_for(make: Make) -> None:
    data = make()
    before = data.fingerprint(labelled=True)
    assert before.items() > data.fingerprint().items()
    data._labelled("dots").labels[3] ^= 1
    after = data.fingerprint(labelled=True)
    assert [key for key in before if before[key] != after[key]] == ["dots adaptation labels"]


def test_a_task_without_adaptation_images_is_evaluated_only(make: Make) -> None:
    data = make({"bars": {"adapt": None}})
    assert data.adapting_tasks == data.tasks_here() == ("circles", "dots")
    assert data.tested_tasks == TASKS
    assert list(next(iter(data.train_dataloader()))[0]) == ["circles", "dots"]
    assert [len(loaders()) for loaders in (data.val_dataloader, data.test_dataloader)] == [2, 3]
    assert [sum(len(b["index"]) for b in loader) for loader in data.predict_dataloader()] == [9, 9, 9]
    assert data.transductive()["bars"] == 0
    assert "bars adaptation" not in data.fingerprint()
    with pytest.raises(
        InputError, match="'bars', adaptation images: none were given.\nSet data.tasks.bars.adapt"
    ):
        data.adaptation("bars")


def test_adapting_needs_a_task_with_images(make: Make) -> None:
    data = make({task: {"adapt": None} for task in TASKS})
    for loaders in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(InputError, match="no task has adaptation images"):
            loaders()


def test_testing_needs_a_task_with_test_images(make: Make) -> None:
    with pytest.raises(InputError, match=r"there is nothing to measure.\nSet data.tasks.TASK.test"):
        make({task: {"test": None} for task in TASKS}).test_dataloader()


class TestBackbones:
    @staticmethod
    def backbone(key: str | None, level: int) -> Any:
        def preprocess(_: object) -> torch.Tensor:
            return torch.full((3, 2, 2), level, dtype=torch.uint8)

        return SimpleNamespace(preprocess=preprocess, transform_key=key)

    def test_images_of_another_backbone_are_loaded_anew(self, make: Make) -> None:
        data = make()
        for key, level in (("a", 1), ("a", 1), ("b", 2)):
            data.use(self.backbone(key, level))
            assert data.adaptation("bars").images.unique().tolist() == [level]

    def test_without_a_key_the_function_itself_tells_backbones_apart(self, make: Make) -> None:
        data = make()
        first, second = self.backbone(None, 1), self.backbone(None, 2)
        data.use(first)
        kept = data.adaptation("bars")
        data.use(first)
        assert data.adaptation("bars") is kept
        data.use(second)
        assert data.adaptation("bars").images.unique().tolist() == [2]

    @pytest.mark.parametrize(("cache", "expected"), [(True, 3), (False, 4)])
    def test_a_named_transform_is_computed_once(self, make: Make, cache: bool, expected: int) -> None:
        make(cache=cache).test("bars")
        for level in (3, 4):
            data = make(cache=cache)
            data.use(self.backbone(f"named {cache}", level))
            found = data.test("bars").images.unique().tolist()
        assert found == [expected]


@pytest.mark.parametrize(
    ("rank", "world", "mine"),
    [(0, 1, TASKS), (0, 2, ("circles", "dots")), (1, 2, ("bars",)), (2, 3, ("dots",))],
)
def test_tasks_are_dealt_out_to_processes(make: Make, rank: int, world: int, mine: tuple[str, ...]) -> None:
    data = make()
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, global_step=7)
    assert data.tasks_here() == mine
    assert data.state_dict() == {"step": 7}


def test_more_processes_than_tasks_are_refused(make: Make) -> None:
    data = make()
    data.trainer = SimpleNamespace(global_rank=0, world_size=4)
    with pytest.raises(InputError, match="4 processes for 3 tasks.*\nUse at most --trainer.devices 3"):
        data.tasks_here()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"batch_size": 0}, r"batch_size=0 is out of range.\nUse a whole number in \[1, 1e6\]"),
        ({"eval_batch_size": -1}, r"eval_batch_size=-1 is out of range.\nUse a whole number in \[1, 1e6\]"),
        ({"holdout": 1.0}, r"holdout=1.0 is out of range.\nUse a number in \[0, 1\)"),
        ({"holdout": -0.1}, r"holdout=-0.1 is out of range.\nUse a number in \[0, 1\)"),
        ({"shots": -1}, r"shots=-1 is out of range.\nUse a whole number in \[0, 1e9\]"),
        ({"num_workers": -1}, r"num_workers=-1 is out of range.\nUse a whole number in \[0, 256\]"),
    ],
)
def test_options_out_of_range_are_refused(make: Make, option: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make(**option)


def test_images_from_files_need_a_models_preprocessing(make: Make) -> None:
    data = make()
    data.preprocess = None
    with pytest.raises(InputError, match="need the model's preprocessing"):
        data.adaptation("bars")


class TestClasses:
    def test_adaptation_images_of_other_classes_are_told(self, make: Make, rows: Rows) -> None:
        data = make({"bars": {"adapt": rows["dots"]["adapt"], "test": None}})
        with pytest.warns(AdamergeWarning, match=r"'bars': adaptation images have the classes .*its images"):
            data.adaptation("bars")

    def test_class_folders_and_class_names_differ_in_number(self, make: Make) -> None:
        data = make({"bars": {"classes": ["0_flat", "2_upright"]}})
        with pytest.raises(DataError) as caught:
            data.test("bars")
        assert str(caught.value) == (
            "task 'bars' has 2 class names, its test images have 3; "
            "first difference at index 1: '2_upright' vs '1_steep'.\n"
            "List the classes in the order of the labels."
        )
        assert caught.value.exit_code == 3

    def test_classes_in_another_order_than_the_class_folders_are_refused(self, make: Make) -> None:
        data = make({"bars": {"classes": ["flat", "upright", "steep"]}})
        for labelled in (data.test, data.adaptation_labels):
            with pytest.raises(DataError) as caught:
                labelled("bars")
            assert str(caught.value) == (
                "task 'bars': from index 1 on classes are [upright, steep], "
                "the data have, in order, [1_steep, 2_upright].\n"
                "List the classes in the order of the labels."
            )

    @pytest.mark.parametrize("label", [-1, 2, 255])
    def test_labels_outside_the_classes_are_refused(self, make: Make, label: int) -> None:
        data = make()
        images = data.test("dots")
        images.labels[3] = label
        data._loaded["dots", "test"] = type(images)(images.images, images.labels)
        with pytest.raises(
            DataError, match=f"'dots': test images have label {label}, there are 2 class names"
        ):
            data.test("dots")

    def test_a_head_file_without_class_names_takes_any_labels(self, make: Make, tmp_path: Path) -> None:
        (tmp_path / "head.safetensors").touch()
        data = make({"bars": {"classes": [], "head": str(tmp_path / "head.safetensors")}})
        assert int(data.test("bars").labels.max()) == 2
