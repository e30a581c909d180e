"""Tables and sentences of a report."""

import math
import re

import pytest
import torch

from adamerge.inspection import Report, inspect
from adamerge.inspection.tables import markdown, sentences_of, show, tables_of


@pytest.fixture(scope="module")
def many() -> Report:
    base = {f"h.{i}.weight": torch.eye(3) + i for i in range(20)}
    experts = {
        f"expert {seed}": {
            n: t + 0.01 * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
            for n, t in base.items()
        }
        for seed in range(12)
    }
    del experts["expert 0"]["h.3.weight"]
    experts["expert 1"]["extra|[red]"] = torch.ones(1)
    return inspect(base, experts)


def test_tables_have_a_cell_in_every_column(many: Report) -> None:
    tables = list(tables_of(many))
    assert [len(table.lines) for table in tables] == [13, 2, 12, 12, 20]
    assert all(len(line) == len(table.header) for table in tables for line in table.lines)


def test_a_markdown_report_is_complete(many: Report) -> None:
    text = markdown(many, ["norms.png"])
    assert all(f"| h.{i} | " in text for i in range(20))
    assert r"extra\|[red]" in text
    assert "![norms](norms.png)" in text
    assert all(f"- {sentence}\n" in text for sentence in sentences_of(many))


def test_pairs_hold_cosines_below_and_conflicts_above_the_diagonal() -> None:
    up, down = {"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([2.0, -1.0])}
    report = inspect({"w": torch.tensor([1.0, 5.0])}, {"up": up, "down": down})
    pairs = next(table for table in tables_of(report) if table.title.startswith("Pairs"))
    cosine = (1 + 24) / math.sqrt((1 + 16) * (1 + 36))
    assert pairs.lines == [["up", "", "0.0 %"], ["down", f"{cosine:.2f}", ""]]


def test_a_terminal_gets_the_first_lines_and_every_column(
    many: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show(many)
    shown = capsys.readouterr().out
    assert "and 4 more" in shown  # of 20 blocks
    headers = [line for line in shown.splitlines() if line.startswith("┃ block ")]
    assert re.findall(r"expert \d+", " ".join(headers)) == [f"expert {seed}" for seed in range(12)]
    assert "\u2026" not in shown  # no cell is cut
    assert "extra|[red]" in shown  # no markup
    assert max(map(len, shown.splitlines()[:60])) <= 80
    assert shown.endswith("A merge would be refused.\n")
