"""What routed experts are added to: the shared model, or the base where they are routed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import method, noise, specs
from conftest import TASKS
from safetensors.torch import save_file
from torch.testing import assert_close

from adamerge import InputError, Learned, MergeTask, Oracle, Router, Subspace
from adamerge.checkpoints import open_checkpoint
from adamerge.fitting import merge_task, open_vectors
from adamerge.static import edit as apply_edit
from adamerge.vectors import TaskVectors

MLP = r"\.mlp\."


def sources(clip: Path) -> tuple[str, dict[str, str]]:
    return str(clip / "base"), {task: str(clip / "experts" / f"{task}.safetensors") for task in TASKS}


def experts_of(clip: Path) -> TaskVectors:
    return open_vectors(*sources(clip))[0]


def compose(clip: Path, **options: Any) -> MergeTask:
    return merge_task(*sources(clip), specs(), **options)


def wemoe() -> Router:
    return Router("mlp", "block", select="none", initial=0.3, groups=MLP)


def test_what_is_not_routed_is_the_shared_models_and_the_rest_the_bases(clip: Path) -> None:
    task = compose(clip, shared="task_arithmetic", relative_to="base", coefficients=wemoe(), codec="fp32")
    base, experts = open_checkpoint(clip / "base"), experts_of(clip)
    merged = experts.merge(experts.uniform(0.3))
    routed = {name for name in experts.names if ".mlp." in name}
    assert set(task.vectors.names) == set(task.mixture.routed) == routed
    for name, found in task.mixture.shared.items():
        if name in merged:
            assert_close(found, base[name].float() if name in routed else merged[name])


def test_wemoe_starts_as_task_arithmetic(clip: Path) -> None:
    router = Router("bias", "block", select="none", initial=0.3, groups=MLP)
    task = compose(clip, shared="task_arithmetic", relative_to="base", coefficients=router, codec="fp32")
    experts = experts_of(clip)
    images, mixture = noise(5, 0).images, task.mixture
    found = mixture.features(images, mixture.gates(images))
    assert_close(found, mixture.backbone.features(experts.merge(experts.uniform(0.3)), images))


def test_smile_leaves_nothing_between_the_shared_model_and_the_experts(clip: Path) -> None:
    options = yaml.safe_load(method("smile").read_text())["model"]
    options["coefficients"] = Subspace(**options["coefficients"]["init_args"])
    task = compose(clip, **options)
    assert set(task.mixture.routed) == set(task.vectors.names)
    experts = experts_of(clip)
    average = experts.merge(experts.uniform(1 / 3))
    fixed = [name for name in average if name not in task.vectors.names]
    assert {"visual.proj", "visual.conv1.weight"} <= set(fixed)
    for name in fixed:
        assert_close(task.mixture.shared[name], average[name])


def test_it_may_be_a_checkpoint(clip: Path, tmp_path: Path) -> None:
    experts = experts_of(clip)
    merged = experts.state(experts.uniform(0.3))
    save_file({name: value.contiguous() for name, value in merged.items()}, tmp_path / "m.safetensors")
    own = compose(clip, shared=str(tmp_path / "m.safetensors"), coefficients=Oracle(), codec="fp32")
    made = compose(clip, shared="task_arithmetic", coefficients=Oracle(), codec="fp32")
    for task in TASKS:
        a, b = (t.vectors.merge(t.vectors.one_hot(task)) for t in (own, made))
        for name, value in a.items():
            assert_close(value, b[name])
    for name, value in own.mixture.shared.items():
        assert_close(value, made.mixture.shared[name])


def test_static_coefficients_learn_on_it_too(clip: Path) -> None:
    task = compose(clip, shared="task_arithmetic", codec="low_rank", coefficients=Learned("task", 0.0))
    experts = experts_of(clip)
    expected = experts.merge(experts.uniform(0.3))
    found = task.merged_state()
    for name, value in expected.items():
        assert_close(found[name].float(), value)


def test_teachers_are_the_experts_as_they_are(clip: Path) -> None:
    rough = compose(clip, shared="base", codec="low_rank", codec_options={"rank": 1}, coefficients=Oracle())
    experts = experts_of(clip)
    for task in TASKS:
        expected = experts.merge(experts.one_hot(task), rough.read_names)
        found = rough._expert_weights(task)
        for name, value in expected.items():
            assert_close(found[name], value)


def test_edits_come_first(clip: Path) -> None:
    edited = compose(clip, shared="average", edit="ties_trim", coefficients=Oracle(), codec="fp32")
    vectors = apply_edit(experts_of(clip), "ties_trim")
    for task in TASKS:
        hot = vectors.one_hot(task)
        expected, found = vectors.merge(hot), edited.vectors.merge(hot)
        for name, value in expected.items():
            assert_close(found[name], value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shared": "task_arithmetics"}, "neither a static method nor a file.\nDid you mean 'task_arith"),
        (
            {"shared": "average", "codec_options": {"fractoin": 0.1}},
            "no option 'fractoin'.\nDid you mean",
        ),
        (
            {"shared": "average", "codec": "fp32", "codec_options": {"rank": 2}},
            "'fp32' has no option 'rank'",
        ),
        ({"shared": "average", "codec_options": {"fraction": 2.0}}, "fraction=2.0"),
        ({"shared": "average", "codec": "low_ranks"}, "'low_ranks' is unknown.\nDid you mean 'low_rank'"),
        ({"shared": "average", "codec": "stream"}, "codec 'stream' stores nothing"),
        ({"shared": "task_arithmetic", "shared_options": {"scael": 0.3}}, "scael"),
        ({"relative_to": "base"}, "relative_to are of no use without `shared`"),
        (
            {"shared_options": {"scale": 0.3}},
            "shared_options and .* are of no use",
        ),
        ({"shared": "base", "shared_options": {"scale": 0.3}}, "shared='base' takes no shared_options"),
    ],
)
def test_options_that_cannot_work_are_refused(clip: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        compose(clip, **({"codec": "low_rank", "coefficients": Router()} | options))
