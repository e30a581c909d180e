"""Rows and tables."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adamerge.results import (
    ResultRow,
    doubts,
    make_row,
    outcome,
    print_table,
    read_row,
    table_lines,
    write_predictions,
    write_row,
    write_table,
)

ROWS = [
    make_row("individual", {"cars": 80.0, "digits": 100.0}, {"cars": 80.0, "digits": 100.0}),
    make_row(
        "merged",
        {"cars": 60.0, "digits": 90.0, "new": 12.345},
        notes=["stopped early"],
        transductive=["cars"],
        provenance={"code": {"adamerge": "0"}},
    ),
]


def test_the_means() -> None:
    row = make_row("x", {"cars": 60.0, "digits": 90.0}, {"cars": 80.0, "digits": 100.0})
    assert row.mean == 75
    assert row.normalized_mean == pytest.approx((75 + 90) / 2)


@pytest.mark.parametrize("individual", [None, {}, {"cars": 80.0}, {"cars": 80.0, "digits": 0.0}])
def test_without_every_experts_accuracy_there_is_no_normalised_mean(individual: dict[str, float]) -> None:
    assert make_row("x", {"cars": 60.0, "digits": 90.0}, individual).normalized_mean is None


def test_a_row_comes_back_from_its_file(tmp_path: Path) -> None:
    write_row(tmp_path / "run" / "result.json", ROWS[1])
    assert read_row(tmp_path / "run" / "result.json") == ROWS[1]


def test_lines_cover_all_tasks_and_mark_what_is_transductive() -> None:
    assert table_lines(ROWS) == [
        ["method", "cars", "digits", "new", "mean", "normalized"],
        ["individual", "80.0", "100.0", "-", "90.0", "100.0"],
        ["merged", "60.0*", "90.0", "12.3", "54.1", "-"],
    ]


def test_unseen_tasks_have_a_mean_of_their_own() -> None:
    row = make_row("x", {"cars": 60.0, "new": 20.0}, {"cars": 80.0}, unseen=["new"])
    assert (row.mean, row.unseen_mean, row.normalized_mean) == (60.0, 20.0, 75.0)
    assert table_lines([row])[0][-3:] == ["mean", "normalized", "unseen"]
    assert table_lines([row])[1][-3:] == ["60.0", "75.0", "20.0"]


def test_what_was_published_is_marked_and_names_its_source() -> None:
    published = make_row("merged", {"cars": 61.0}, source="a paper, table 1")
    header, ours, theirs = table_lines([ROWS[0], published])
    assert (header[-1], ours[-1], theirs[-1]) == ("source", "here", "a paper, table 1")
    assert theirs[0] == "published: merged"


def test_the_three_files_hold_the_same_table(tmp_path: Path) -> None:
    write_table(tmp_path, ROWS)
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["tasks"] == ["cars", "digits", "new"]
    assert [ResultRow(**row) for row in document["rows"]] == ROWS
    with (tmp_path / "results.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == table_lines(ROWS)
    markdown = (tmp_path / "results.md").read_text().splitlines()
    assert markdown[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert markdown[3] == "| merged | 60.0* | 90.0 | 12.3 | 54.1 | - |"


def test_the_terminal_shows_the_table_and_every_note(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ROWS, "demo")
    printed = capsys.readouterr().out
    for fragment in ("demo", "54.1", "merged: stopped early", "* transductive: the test images"):
        assert fragment in printed
    print_table([replace(row, inputs="texts") for row in ROWS], "demo")
    assert "* transductive: the test texts were among the adaptation texts" in capsys.readouterr().out
    print_table(ROWS[:1], "demo")
    assert "transductive" not in capsys.readouterr().out


def test_predictions_name_the_class_where_names_are_known(tmp_path: Path) -> None:
    columns = {"index": torch.tensor([4, 5]), "class": torch.tensor([1, 0])}
    columns["probability"] = torch.tensor([0.5, 0.25])
    batches = [{"task": task, **columns} for task in ("cars", "digits")]
    write_predictions(tmp_path / "predictions.csv", batches, {"cars": ["Audi", "BMW, new"]})
    with (tmp_path / "predictions.csv").open(newline="") as stream:
        _, *lines = csv.reader(stream)
    assert lines[0] == ["cars", "4", "1", "BMW, new", "0.500000"]
    assert lines[3] == ["digits", "5", "0", "", "0.250000"]


def numbers_of(printed: str) -> list[str]:
    return re.findall(r"\d+\.\d", printed)


@pytest.mark.parametrize(("width", "n_tasks"), [("80", 8), ("60", 5), ("40", 3), ("20", 2), ("300", 8)])
def test_every_number_is_whole_at_any_width(
    width: str, n_tasks: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    accuracy = {f"task_{i}": 80 + i + i / 10 for i in range(n_tasks)}
    methods = ("adamerging_layer_wise_kl", "published: Task Arithmetic [of a table]")
    print_table([make_row(name, accuracy, accuracy) for name in methods], "a title")
    printed = capsys.readouterr().out
    expected = [f"{value:.1f}" for value in accuracy.values()]
    for number in [*expected, "100.0"]:
        assert numbers_of(printed).count(number) >= len(methods), number
    assert max(map(len, printed.splitlines())) <= int(width)
    assert "\u2026" not in printed


def test_experts_at_chance_and_models_far_above_their_experts_are_noted() -> None:
    row = make_row("merged", {"cars": 60.0, "pets": 90.0}, {"cars": 50.0, "pets": 60.0})
    [chance, odd] = doubts({"cars": 50.0, "pets": 60.0}, {"cars": 2, "pets": 3}, row)
    assert chance.startswith("the expert of 'cars' is no better than chance: 50.0 % of 2 classes")
    assert odd.startswith("normalized mean 135.0")
    assert doubts({"cars": 50.1}, {"cars": 2}, make_row("x", {"cars": 55.0}, {"cars": 50.1})) == []


def test_the_outcome_is_an_accuracy_or_an_agreement() -> None:
    assert outcome(ROWS[0]) == "mean accuracy 90.0 % (100.0 % of the experts)"
    shares = {"cars": {"start": 50.0, "now": 80.0}, "pets": {"start": 50.0, "now": 90.0}}
    blind = make_row("x", {}, details={"agreement": shares})
    assert outcome(blind) == "agrees with the experts on 85.0 % of held-out inputs"
