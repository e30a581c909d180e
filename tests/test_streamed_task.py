"""Experts that stay in their files: Frank-Wolfe learns the same as on vectors in memory, in small reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import adapt, make_task, memory_data, specs
from conftest import TASKS, nudge
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from adamerge import FrankWolfe, InputError, KLTeacher, MergeTask
from adamerge.checkpoints import SpanReader
from adamerge.fitting import merge_task
from adamerge.vectors import streamed

CHUNK = 64


def learned(clip: Path, codec: str) -> MergeTask:
    """Take three steps that each task's own teacher asks for."""

    def soft(parameters: Any) -> FrankWolfe:
        return FrankWolfe(parameters, lr=0.5, soft=True)

    task = make_task(clip, objective=KLTeacher(), optimizer=soft, codec=codec)
    adapt(task, memory_data(), 3)
    return task


def test_steps_evaluation_and_export_are_those_of_vectors_in_memory(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, spans, read = learned(clip, "fp32"), [], SpanReader.__getitem__

    def noted(self: SpanReader, span: slice) -> torch.Tensor:
        spans.append(span.stop - span.start)
        return read(self, span)

    monkeypatch.setattr(SpanReader, "__getitem__", noted)
    monkeypatch.setattr(streamed, "_CHUNK", CHUNK)
    task = learned(clip, "stream")
    assert_close(task.coefficients.table()[1], stored.coefficients.table()[1], rtol=0, atol=1e-6)
    assert (task.coefficients.table()[1] - 0.3).abs().max() > 0.1
    assert_close(task.merged_state(), stored.merged_state(), rtol=0, atol=1e-6)
    assert task.evaluate() == stored.evaluate()
    assert task.evaluate_experts() == stored.evaluate_experts()
    assert task.vectors.n_bytes == 0
    assert max(spans) * 2 <= CHUNK


def compose(clip: Path, codec: str, **experts: str) -> MergeTask:
    found = {task: str(clip / "experts" / f"{task}.safetensors") for task in TASKS}
    return merge_task(str(clip / "base"), found | experts, specs(), codec=codec)


def test_a_run_knows_its_files_whatever_is_stored(clip: Path) -> None:
    digests = compose(clip, "stream").vectors.digests
    assert set(digests) == {"base", *TASKS}
    assert digests == compose(clip, "bf16").vectors.digests


def test_a_foreign_expert_is_refused_before_the_first_step(clip: Path, tmp_path: Path) -> None:
    base = load_file(clip / "base" / "open_clip_model.safetensors")
    save_file(nudge(base, 1, size=10.0), tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match=r"\['bars'\] are farther from the base than the base is long"):
        compose(clip, "stream", bars=str(tmp_path / "foreign.safetensors"))
