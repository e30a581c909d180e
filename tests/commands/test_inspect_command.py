"""`adamerge inspect` on files: exit codes, streams, and what is written."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import TASKS
from safetensors.torch import load_file, save_file

from adamerge.cli import main
from adamerge.ownership import LIST


def arguments(clip: Path, **more: Path) -> list[str]:
    paths = {task: clip / "experts" / f"{task}.safetensors" for task in TASKS} | more
    given = [word for name, path in paths.items() for word in ("--experts", f"{name}={path}")]
    return ["inspect", "--base", str(clip / "base"), *given]


@pytest.fixture
def diverged(clip: Path, tmp_path: Path) -> Path:
    state = load_file(clip / "experts" / f"{TASKS[0]}.safetensors")
    state["visual.proj"][0, 1] = float("nan")
    save_file(state, tmp_path / "diverged.safetensors")
    return tmp_path / "diverged.safetensors"


def test_sound_experts_pass_and_are_shown(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(clip)) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("A merge would be accepted.\n")
    assert "visual.transformer.resblocks.1" in shown.out
    assert all(task in shown.out for task in TASKS)
    assert shown.err == ""


def test_json_is_one_document_and_nothing_else(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(clip), "--json", "--rank", "false"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document) == [
        "tasks", "problems", "notes", "base", "experts", "misfits", "nonfinite", "partial", "kept", "tied",
        "same_base", "zero", "repeated", "vectors",
    ]  # fmt: skip
    assert list(document["vectors"]) == [
        "tensors", "entries", "norm", "relative_norm", "density", "unchanged", "cosine", "conflict", "ranks",
        "blocks", "matrices",
    ]  # fmt: skip
    assert document["tasks"] == list(TASKS)
    assert document["vectors"]["ranks"] is None
    assert {row["reason"] for row in document["kept"]} == {"no expert"}  # the text tower


def test_problems_exit_with_2_and_are_all_reported(
    clip: Path, diverged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"visual.proj": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    given = arguments(clip, diverged=diverged, other=tmp_path / "other.safetensors", lost=tmp_path / "no")
    assert main(given) == 2
    shown = capsys.readouterr().out
    assert (
        "expert 'diverged': 1 tensors have non-finite values; first index (count): visual.proj[0, 1]" in shown
    )
    assert "other.safetensors) lacks 31 of 50 tensors" in shown
    assert "visual.proj [3, 3] vs base [16, 12]" in shown
    assert f"expert 'lost': {tmp_path / 'no'} does not exist; {tmp_path} holds " in shown
    for unknown in ("embedded:nobody", "open_clip:nothing"):
        assert main(arguments(clip, x=unknown)) == 2
        assert unknown.partition(":")[2] in capsys.readouterr().err


def test_a_folder_gets_the_report_and_pictures(
    clip: Path, diverged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert main([*arguments(clip, diverged=diverged), "--json", "--out", str(out)]) == 2
    assert (out / "inspect.json").read_text() == capsys.readouterr().out
    pictures = {"norms.png", "cosine.png", "sign_conflict.png", "effective_rank.png"}
    assert {path.name for path in out.iterdir()} == pictures | {"inspect.json", "inspect.md", LIST}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert all(f"({name})" in (out / "inspect.md").read_text() for name in pictures)


def test_a_folder_that_exists_is_replaced_only_when_asked(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "out").mkdir()
    given = [*arguments(clip), "--rank", "false", "--out", str(tmp_path / "out")]
    assert main(given) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert main([*given, "--overwrite"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "norms.png" in names
    assert "effective_rank.png" not in names


def test_without_matplotlib_nothing_is_begun(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*arguments(clip), "--out", str(tmp_path / "out")]) == 5
    shown = capsys.readouterr()
    assert "pip install matplotlib" in shown.err
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_patterns_let_tensors_be_missing_or_left_out(clip: Path, tmp_path: Path) -> None:
    state = load_file(clip / "experts" / f"{TASKS[0]}.safetensors")
    del state["visual.proj"]
    state["extra"] = torch.ones(2)
    save_file(state, tmp_path / "odd.safetensors")
    given = [*arguments(clip, odd=tmp_path / "odd.safetensors"), "--rank", "false"]
    assert main(given) == 2
    assert main([*given, "--allow-missing", "visual.proj"]) == 2
    assert main([*given, "--allow-missing", "visual.proj", "--exclude", "extra"]) == 0


def test_force_reports_as_notes_what_a_forced_merge_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, heads in (("base", 2), ("x", 4)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((3,), float(heads))}, tmp_path / name / "model.safetensors")
        config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": heads}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    words = [
        "inspect",
        "--base",
        str(tmp_path / "base"),
        "--experts",
        f"x={tmp_path / 'x'}",
        "--json",
        "true",
    ]
    assert main(words) == 2
    assert any("--force true" in problem for problem in json.loads(capsys.readouterr().out)["problems"])
    assert main([*words, "--force", "true"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["problems"]
    assert any(
        "accepted by force" in note and "num_attention_heads differs" in note for note in report["notes"]
    )
