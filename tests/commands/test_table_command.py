"""`adamerge table`: rows of several runs in one table, if they are of the same test images."""

import json
from pathlib import Path

import pytest

from adamerge.cli import main
from adamerge.results import make_row, write_row, write_table

TASKS = {"cars": 60.0, "dots": 80.0}


def provenance(base: str = "base", expert: str = "expert", **data: str) -> dict:
    weights = {"base": base, **dict.fromkeys(TASKS, expert)}
    return {"weights": weights, "data": {f"{task} test": digest for task, digest in data.items()}}


OURS = provenance(cars="a", dots="b")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    individual = make_row("individual", {"cars": 80.0, "dots": 100.0}, provenance=OURS)
    published = make_row("TA", TASKS, source="a paper", details={"family": "tall"})
    write_table(tmp_path / "table", [individual, published])
    write_row(tmp_path / "same" / "result.json", make_row("mine", TASKS, provenance=OURS))
    write_row(
        tmp_path / "again" / "result.json", make_row("mine", {"cars": 62.0, "dots": 80.0}, provenance=OURS)
    )
    other = make_row("mine", TASKS, provenance=provenance(cars="a", dots="c"))
    write_row(tmp_path / "images" / "result.json", other)
    write_row(tmp_path / "tasks" / "result.json", make_row("mine", {"cars": 60.0}, provenance=OURS))
    for part in ("base", "expert"):
        row = make_row("mine", TASKS, provenance=provenance(cars="a", dots="b", **{part: "another"}))
        write_row(tmp_path / part / "result.json", row)
    write_row(tmp_path / "nothing" / "result.json", make_row("mine", TASKS))
    return tmp_path


def joined(runs: Path, *names: str, mixed: bool = False) -> list[dict]:
    given = [str(runs / name) for name in names]
    assert main(["table", *given, "--out", str(runs / "out"), *["--mixed"] * mixed]) == 0
    return json.loads((runs / "out" / "results.json").read_text())["rows"]


def test_rows_of_the_same_images_are_joined_and_normalised(runs: Path) -> None:
    rows = joined(runs, "table", "same", "again")
    assert [row["method"] for row in rows] == ["individual", "TA", "mine", "mine #2"]
    assert rows[2]["normalized_mean"] == pytest.approx((75 + 80) / 2)
    assert "published: TA" in (runs / "out" / "results.md").read_text()
    assert (runs / "out" / "accuracy.png").exists()


def test_a_row_is_normalised_by_its_own_experts_alone(runs: Path) -> None:
    individual = make_row("individual", {"cars": 60.0, "dots": 100.0})
    individual.provenance = provenance(cars="a", dots="b", expert="another")
    assert joined(runs, "table", "expert")[-1]["normalized_mean"] is None
    write_row(runs / "own" / "result.json", individual)
    assert joined(runs, "table", "expert", "own")[2]["normalized_mean"] == pytest.approx((100 + 80) / 2)


def test_the_table_may_replace_one_of_its_runs(runs: Path) -> None:
    given = [str(runs / "table"), str(runs / "same")]
    assert main(["table", *given, "--out", given[0]]) == 0
    assert len(json.loads((runs / "table" / "results.json").read_text())["rows"]) == 3


def test_a_row_that_comes_twice_stands_once(runs: Path) -> None:
    assert len(joined(runs, "same", "table", "same", "table")) == 3


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("images", "other test images of 'dots'"),
        ("tasks", "other tasks: dots"),
        ("base", "another base"),
        ("nothing", "other test images of 'cars'"),
    ],
)
def test_other_images_are_refused_unless_asked(
    runs: Path, name: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(runs / "table"), str(runs / name)]) == 2
    told = capsys.readouterr().err
    assert problem in told
    assert "--mixed" in told
    assert joined(runs, "table", name, mixed=True)[-1]["notes"] == [problem]


def test_published_rows_of_two_families_are_not_mixed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = make_row("TA", TASKS, source="a paper", details={"family": "tanganke"})
    write_table(runs / "foreign", [make_row("mine", TASKS, provenance=OURS), foreign])
    assert main(["table", str(runs / "table"), str(runs / "foreign")]) == 2
    assert "families of checkpoints" in capsys.readouterr().err


def test_a_folder_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(tmp_path)]) == 2
    assert "holds neither result.json nor results.json" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("[1]")
    assert main(["table", str(tmp_path)]) == 2
    assert "holds no table of adamerge" in capsys.readouterr().err
