"""MergeTask with a router: what it learns, what it refuses, and what resuming gives back."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_trainer, memory_data, specs
from conftest import TASKS
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close

from adamerge import Entropy, InputError, KLTeacher, Learned, Oracle, Router, Subspace, TaskIdentity, Uniform
from adamerge.coefficients import Coefficients
from adamerge.data.datasets import Images
from adamerge.fitting import merge_task
from adamerge.mixture import latency
from adamerge.objectives import Mixed, Objective, ReliableEntropy
from adamerge.task import MergeTask

State = dict[str, Tensor]
CODECS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "low_rank": {"fraction": 0.25},
    "magnitude": {"density": 0.2},
    "bernoulli": {"density": 0.5},
    "ternary": {},
}
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "identity": TaskIdentity,
    "entropy": Entropy,
    "teacher": KLTeacher,
    "mixed": lambda: Mixed([TaskIdentity(), Entropy(), KLTeacher()], [1.0, 0.5, 1.0]),
}
SELECTIONS: tuple[dict[str, Any], ...] = (
    {"select": "softmax", "temperature": 0.5},
    {"select": "top_1"},
    {"select": "top_k", "k": 2, "renormalize": True},
    {"select": "top_p", "p": 0.6},
    {"select": "none", "initial": 0.3},
)
MLP = r"\.mlp\."


def adam(rate: float):
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def routed_task(clip: Path, coefficients: Coefficients | None, **options: Any) -> MergeTask:
    """A MergeTask whose shared model is task arithmetic."""
    experts = {task: str(clip / "experts" / f"{task}.safetensors") for task in TASKS}
    options = {"shared": "task_arithmetic", "codec": "low_rank"} | options
    return merge_task(str(clip / "base"), experts, specs(), coefficients=coefficients, **options)


def train(task: MergeTask, steps: int, *callbacks: Any, data: Any = None, **options: Any) -> State:
    """Adapt and give the router's whole state."""
    fit_options = {"ckpt_path": options.pop("ckpt_path", None)}
    make_trainer(steps, *callbacks, **options).fit(task, datamodule=data or memory_data(), **fit_options)
    return {name: value.clone() for name, value in task.coefficients.state_dict().items()}


def same(a: State, b: State) -> bool:
    return set(a) == set(b) and all(torch.equal(value, b[name]) for name, value in a.items())


def bright(n_adapt: int = 40, n_test: int = 12, **options: Any):
    """Tasks whose images tell where they come from."""
    data = memory_data(n_adapt, n_test, **options)
    for (task, part), images in data._loaded.items():
        shifted = images.images // 4 + 60 * TASKS.index(task)
        data._loaded[task, part] = Images(shifted, images.labels)
    return data


@cache
def example(clip: Path, codec: str) -> MergeTask:
    """Vectors, heads and teachers that all combinations of one codec share."""
    return routed_task(clip, Router(), codec=codec, codec_options=CODECS[codec])


@cache
def teachers(clip: Path) -> dict[str, Tensor]:
    task = example(clip, "fp32")
    images = memory_data()._loaded
    return {t: torch.randn(40, task.heads[t].weight.shape[1]) for t in TASKS if (t, "adaptation") in images}


def routers() -> list[dict[str, Any]]:
    """Every network, place and selection."""
    block = {"reads": "block", "groups": MLP}
    networks = ("linear", "paper", "mlp", "bias")
    found = [
        {"network": n, **place, **select} for n in networks for place in ({}, block) for select in SELECTIONS
    ]
    return [*found, {"network": "mlp", **block, "shared": True}]


def one_step(clip: Path, options: dict[str, Any], codec: str, objective: Objective) -> bool:
    """Take a step as the trainer does, and tell whether the router has changed."""
    shared = example(clip, codec)
    parts = shared.vectors, shared.backbone, shared.heads
    task = MergeTask(*parts, Router(**options), objective, optimizer=adam(0.01))
    task.known.features = teachers(clip)
    batch = {t: {"images": part.images[:2], "index": torch.arange(2)} for (t, _), part in images_of().items()}
    assert task._router_step is not None
    for t, part in batch.items():
        task._router_step.prepare(t, [part])
    optimizer, before = task.configure_optimizers(), deepcopy(list(task.coefficients.parameters()))
    task.objective.begin_step()
    task.training_step(batch, 0).backward()
    optimizer.step()
    assert set(task.losses) == set(TASKS)
    return any(not torch.equal(a, b) for a, b in zip(before, task.coefficients.parameters(), strict=True))


@cache
def images_of() -> dict[tuple[str, str], Images]:
    return {key: part for key, part in bright()._loaded.items() if key[1] == "adaptation"}


def refusal(options: dict[str, Any], objective: str) -> str:
    """Give the reason why a router and an objective do not fit; empty where they do."""
    is_inside = options.get("reads") == "block"
    if is_inside and objective == "identity":
        return "TaskIdentity reads router logits; this router reads blocks"
    return "normalises over the images of a pass" if is_inside and options["network"] == "paper" else ""


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.usefixtures("unchecked")
def test_routers_codecs_and_objectives_add(clip: Path, codec: str, objective: str) -> None:
    for options in routers():
        reason = refusal(options, objective)
        if reason:
            with pytest.raises(InputError, match=reason):
                one_step(clip, options, codec, OBJECTIVES[objective]())
        elif not (options["network"] == "bias" and objective == "identity"):  # blind, and tasks are balanced
            assert one_step(clip, options, codec, OBJECTIVES[objective]()), options


def test_task_identity_learns_where_images_come_from(clip: Path) -> None:
    def right(task: MergeTask) -> Tensor:
        return torch.tensor([task.evaluation().routing[name][i] for i, name in enumerate(TASKS)])

    task, data = (
        routed_task(clip, Router(), objective=TaskIdentity(), optimizer=adam(0.05)),
        bright(n_test=30),
    )
    task.trainer = make_trainer(1)
    task.trainer.datamodule = data
    assert right(task).mean() < 0.5
    train(task, 30, data=data)
    assert right(task).min() > 0.8
    assert set(task.evaluation().unknown) == set(TASKS)


def test_the_test_images_are_classified_by_the_mixture(clip: Path) -> None:
    task, data = routed_task(clip, Router("paper"), objective=TaskIdentity()), bright(n_test=9)
    train(task, 3, data=data)
    make_trainer(1).test(task, datamodule=data, verbose=False)
    for name in TASKS:
        images = data.test(name)
        label = task.mixture.predict(images.images, name).label
        assert task.accuracy[name] == pytest.approx(100 * float((label == images.labels).float().mean()))
    assert task.evaluate() == pytest.approx(task.accuracy)


class TestAfterTraining:
    @pytest.fixture
    def trained(self, clip: Path) -> MergeTask:
        task = routed_task(clip, Router("paper"), objective=TaskIdentity())
        train(task, 2)
        return task

    def test_the_router_no_longer_looks_at_its_batch(self, trained: MergeTask) -> None:
        state = deepcopy(trained.coefficients.state_dict())
        images = trained.data.test("dots").images
        together = trained.mixture(images, "dots")
        alone = [trained.mixture(image[None], "dots") for image in images]
        assert_close(together, torch.cat(alone))
        latency(trained.mixture, images)
        assert same(state, trained.coefficients.state_dict())

    def test_baselines_answer_a_single_image(self, trained: MergeTask) -> None:
        data = trained.data
        data.eval_batch_size = 11  # and one of 12 is left
        found = {name: trained.evaluation(model) for name, model in trained.mixture.baselines().items()}
        assert set(found) == {"oracle", "hard_top_1", "uniform", "shared"}
        assert found["oracle"].unknown == {}

    def test_training_goes_on_in_training_mode(self, trained: MergeTask) -> None:
        counter = "networks.0.3.drawn"
        before = int(trained.coefficients.state_dict()[counter])
        assert train(trained, 3)[counter] > before


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned")  # there is nothing to learn
@pytest.mark.parametrize(
    ("coefficients", "codec"),
    [(Oracle, "low_rank"), (Uniform, "fp32"), (lambda: Subspace(groups="mlp"), "low_rank")],
)
def test_routing_without_parameters_is_evaluated_after_no_step(
    clip: Path, coefficients: Callable[[], Coefficients], codec: str
) -> None:
    task = routed_task(clip, coefficients(), codec=codec)
    make_trainer(0).fit(task, datamodule=memory_data())
    found = task.evaluation()
    assert task.configure_optimizers() is None
    assert all(sum(weights) == pytest.approx(1) for weights in found.routing.values())
    assert (found.unknown == {}) == isinstance(task.coefficients, Oracle)


def test_a_static_objective_of_routers_is_refused(clip: Path) -> None:
    with pytest.raises(InputError, match="TaskIdentity needs a router.\nUse coefficients such as"):
        routed_task(clip, Learned(), objective=TaskIdentity())
    with pytest.raises(InputError, match="a routed model has no single state"):
        routed_task(clip, Router()).merged_state()


def test_labels_cannot_reach_a_router(clip: Path) -> None:
    honest, lying = memory_data(), memory_data()
    for (task, part), images in lying._loaded.items():
        labels = torch.zeros(len(images.images), dtype=torch.int64)
        lying._loaded[task, part] = Images(images.images, labels)
    objective = Mixed([TaskIdentity(), Entropy(), KLTeacher()])
    a, b = (
        train(routed_task(clip, Router(), objective=deepcopy(objective)), 3, data=d) for d in (honest, lying)
    )
    assert same(a, b)


@pytest.mark.parametrize("images_per_pass", [4, 8, 1000])
def test_images_per_pass_do_not_change_a_run(clip: Path, images_per_pass: int) -> None:
    def learn(n: int) -> State:
        objective = Mixed([TaskIdentity(), Entropy()])
        task = routed_task(
            clip, Router("paper"), objective=objective, images_per_pass=n, optimizer=adam(1e-2)
        )
        return train(task, 3)

    for a, b in zip(learn(images_per_pass).values(), learn(12).values(), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_bf16_autocast_keeps_the_router_in_fp32(clip: Path) -> None:
    task = routed_task(clip, Router("paper"), objective=Entropy(), optimizer=adam(1e-2))
    exact = train(routed_task(clip, Router("paper"), objective=Entropy(), optimizer=adam(1e-2)), 3)
    rounded = train(task, 3, precision="bf16-mixed")
    assert {value.dtype for value in rounded.values()} == {torch.float32, torch.int64}
    assert not same(exact, rounded)
    assert all((a - b).abs().max() < 0.07 for a, b in zip(exact.values(), rounded.values(), strict=True))


def twin(clip: Path, objective: Objective | None = None) -> MergeTask:
    objective = objective or Mixed([TaskIdentity(), ReliableEntropy(threshold=1.0)])
    return routed_task(clip, Router("paper"), objective=objective, optimizer=adam(1e-2))


def wemoe(clip: Path) -> MergeTask:
    router = Router("mlp", "block", select="none", initial=0.3, groups=MLP)
    options = {"codec": "fp32", "relative_to": "base", "optimizer": adam(1e-2)}
    return routed_task(clip, router, objective=KLTeacher(), **options)


resuming = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # only the test saves


@resuming
@pytest.mark.parametrize("make", [twin, wemoe])
def test_resuming_gives_the_same_router_bit_for_bit(
    clip: Path, tmp_path: Path, make: Callable[[Path], MergeTask]
) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole = train(make(clip), 7, saves, enable_checkpointing=True)
    resumed = train(make(clip), 7, ckpt_path=tmp_path / "step=3.ckpt")
    assert same(whole, resumed)


class Interrupted(ReliableEntropy):
    """Ctrl-C within the forward pass of a step, once the router has seen the batch."""

    calls = 0

    def forward(self, logits, task, teacher=None):
        self.calls += 1
        if self.calls == 5:
            raise KeyboardInterrupt
        return super().forward(logits, task, teacher)


@resuming
def test_a_step_that_was_cut_off_leaves_no_trace(clip: Path, tmp_path: Path) -> None:
    whole = twin(clip)
    expected = train(whole, 4)
    saves = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, save_on_exception=True)
    task = twin(clip, Mixed([TaskIdentity(), Interrupted(threshold=1.0)]))
    with pytest.raises(SystemExit):
        train(task, 4, saves, enable_checkpointing=True)
    again = twin(clip)
    found = train(again, 4, ckpt_path=tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 1
    assert same(expected, found)
    assert again.objective.per_task_state() == whole.objective.per_task_state()
