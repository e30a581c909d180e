"""The benchmark of a step's cost, on a tiny model: figures that others read are there and consistent."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_step.py"
TINY = ["--model", "tiny", "--experts", "4", "--images-per-task", "2", "--threads", "1", "--json"]


def run(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys, *options: str) -> dict:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *options])
    bench.main()
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def bench() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_one_line_of_json_gives_time_and_memory(bench, monkeypatch, capsys) -> None:
    found = run(bench, monkeypatch, capsys, "--steps", "3", "--codec", "bf16")
    assert (found["model"], found["experts"], found["images_per_task"], found["runs"]) == ("tiny", 4, 2, 3)
    assert found["ratio"] == pytest.approx(found["step_s"] / found["floor_s"])
    assert found["step_min_s"] <= found["step_s"] <= found["step_max_s"]
    parts = found["merge_s"] + found["forward_backward_s"] + found["project_s"]
    assert parts == pytest.approx(found["step_s"])
    assert found["peak_rss_mib"] > found["peak_rss_above_imports_mib"] > 0
    assert found["merge_gb_s"] > 0
    assert found["project_gb_s"] > 0


@pytest.mark.parametrize(("used", "within"), [(10, True), (50, False)])
def test_memory_is_reported_per_number_of_tasks_against_the_budget(
    bench, monkeypatch, capsys, used: float, within: bool
) -> None:
    def child(args, tasks_in_step: int) -> dict[str, float]:
        plain = tasks_in_step == bench.PLAIN
        return {
            "imported": 100.0,
            "between_steps": 101.0,
            "peak": 103.0 if plain else 100 + used + tasks_in_step,
        }

    monkeypatch.setitem(bench.main.__globals__, "run_child", child)
    found = run(bench, monkeypatch, capsys, "--memory", "--codec", "bf16")
    assert found["peak_by_tasks_mib"] == {"2": used + 2, "4": used + 4}
    assert found["spread"] == pytest.approx((used + 4) / (used + 2) - 1)
    assert found["activations_mib"] == 2.0
    assert found["vectors_mib"] == pytest.approx(4 * found["base_mib"] / 2)
    terms = ("base_mib", "vectors_mib", "gradients_mib", "activations_mib")
    assert found["budget_mib"] == pytest.approx(sum(found[term] for term in terms))
    assert found["within_budget"] == within
