"""A task is a row: what is filled in, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import ones

from adamerge.data.embedded import EMBEDDED_TASKS, SPLITS
from adamerge.data.tasks import TaskSpec, embedded_source, resolve
from adamerge.errors import InputError

ROW = TaskSpec("images", classes=["a", "b"])


def test_a_template_is_the_default() -> None:
    assert resolve({"cars": ROW})["cars"] == TaskSpec("images", None, ["a", "b"], ["a photo of a {}."])


def test_embedded_tasks_know_their_classes_and_templates() -> None:
    name, known = next(iter(EMBEDDED_TASKS.items()))
    row = resolve({name: TaskSpec(f"embedded:{name}/{SPLITS[0]}")})[name]
    assert row.classes == list(known.classes)
    assert row.templates == list(known.templates)
    own = resolve({name: TaskSpec(f"embedded:{name}/{SPLITS[0]}", classes=["x"], templates=["{}!"])})[name]
    assert (own.classes, own.templates) == (["x"], ["{}!"])


def test_an_unseen_embedded_task_knows_them_too() -> None:
    name, known = next(iter(EMBEDDED_TASKS.items()))
    assert resolve({name: TaskSpec(test=f"embedded:{name}/test")})[name].classes == list(known.classes)


def test_a_head_file_needs_no_class_names(tmp_path: Path) -> None:
    save_file({"weight": ones(2, 2)}, tmp_path / "head.safetensors")
    assert (
        resolve({"cars": TaskSpec("images", head=str(tmp_path / "head.safetensors"))})["cars"].classes == []
    )


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "no tasks were given"),
        ({"cars": ROW, "Cars": ROW}, "tasks 'cars' and 'Cars' differ only in case"),
        ({"straße": ROW, "STRASSE": ROW}, "differ only in case"),
        ({"a/b": ROW}, "task name 'a/b' cannot be a file name"),
        ({"": ROW}, "task name '' cannot be"),
        ({".hidden": ROW}, "task name '.hidden' cannot be"),
        ({"cars": TaskSpec(classes=["a"])}, "task 'cars' has no images.\nGive `adapt`, `test`, or both"),
        ({"cars": TaskSpec("x", classes=["a"], corruption="fog")}, "corruption 'fog' is unknown"),
        ({"mnist": TaskSpec("embedded:mnist/adapt", corruption="contrast")}, "too small to be corrupted"),
        ({"mnist": TaskSpec("embedded:mnist/adapt", adapt_corruption="contrast")}, "too small to be"),
        ({"cars": TaskSpec("x", classes=["a"], adapt_corruption="fog")}, "corruption 'fog' is unknown"),
        (
            {"cars": TaskSpec("x", classes=["a"], batch_size=0)},
            "task 'cars': batch_size=0.\nIt must be positive",
        ),
        (
            {"cars": TaskSpec("images", classes=["a"], templates=["a photo"])},
            "template 'a photo' has no '{}'",
        ),
        (
            {"cars": TaskSpec("images", head="nowhere.safetensors")},
            "head file nowhere.safetensors does not exist",
        ),
    ],
)
def test_wrong_rows_are_refused(tasks: dict[str, TaskSpec], message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(tasks)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"classes": [0, 1, 2]}, "classes has 0 (int), which is no text.\nQuote them in the YAML"),
        ({"classes": ["maybe", True]}, "classes has True (bool)"),
        ({"templates": ["{}", None]}, "templates has None (NoneType)"),
    ],
)
def test_words_that_yaml_reads_as_something_else_are_refused(row: dict[str, Any], message: str) -> None:
    spec = TaskSpec("images")
    vars(spec).update(row)  # in tests the types of arguments are checked before
    with pytest.raises(InputError, match=re.escape(message)):
        spec.__post_init__()


@pytest.mark.parametrize("split", SPLITS)
def test_embedded_sources(split: str) -> None:
    name = next(iter(EMBEDDED_TASKS))
    assert embedded_source(f"embedded:{name}/{split}") == (name, split)


def test_unknown_embedded_sources_get_the_nearest_known() -> None:
    name = next(iter(EMBEDDED_TASKS))
    with pytest.raises(InputError, match=f"'{name}x' is unknown.\nDid you mean '{name}'"):
        embedded_source(f"embedded:{name}x/{SPLITS[0]}")
    with pytest.raises(InputError, match="'tost' is unknown"):
        resolve({name: TaskSpec(f"embedded:{name}/tost")})
