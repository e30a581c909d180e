"""Per-task adapters of features: over a frozen merge, beside coefficients, in checkpoints and in files."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from builders import adapt, make_task, make_trainer, memory_data, noise
from conftest import TASKS
from torch import Tensor
from torch.testing import assert_close

from adamerge import FeatureMatching, FrankWolfe, InputError, Learned, MergeTask, Router, Surgery, load
from adamerge.callbacks import MergedModel, Selector
from adamerge.checkpoints import open_checkpoint
from adamerge.errors import NumericError


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def surgery_task(clip: Path, *, frozen: bool = True, **options) -> MergeTask:
    options = {"objective": FeatureMatching(), "optimizer": adam, "adapters": Surgery(rank=4), **options}
    return make_task(clip, Learned("tensor", 1 / 3, frozen=frozen), **options)


@pytest.fixture(scope="module")
def trained(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MergeTask, list[float], Path]:
    """A frozen average after ten steps of surgery, its losses and its folder."""
    task, folder = surgery_task(clip), tmp_path_factory.mktemp("surgery") / "merged"
    losses: list[float] = []

    class Watch(MergedModel):
        def on_train_batch_end(self, *_) -> None:
            losses.append(sum(task.losses.values()))

    adapt(task, memory_data(10, batch_size=8), 10, Watch(folder, clip / "base"))
    return task, losses, folder


def test_at_first_nothing_is_changed(clip: Path) -> None:
    bare, adapted = make_task(clip), make_task(clip, adapters=Surgery())
    features = torch.randn(5, bare.heads[TASKS[0]].weight.shape[1])
    for name in TASKS:
        assert torch.equal(bare.heads[name].logits(features), adapted.fitted_heads[name].logits(features))


def test_the_start_depends_on_the_seed_alone() -> None:
    first, again, other = (Surgery(rank=3, seed=seed) for seed in (1, 1, 2))
    for adapters in (first, again, other):
        adapters.build(("a", "b"), 8)
    assert torch.equal(first.down, again.down)
    assert not torch.equal(first.down, other.down)
    assert first.down.abs().max() <= 8**-0.5  # as a linear layer's
    assert not torch.equal(first.down[0], first.down[1])


def test_the_loss_falls_and_the_merge_stays(trained: tuple[MergeTask, list[float], Path], clip: Path) -> None:
    task, losses, _ = trained
    assert losses[-1] < losses[0]
    untouched = surgery_task(clip).merged_state()
    assert all(torch.equal(value, untouched[name]) for name, value in task.merged_state().items())


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "joint"])
def test_a_step_goes_down_the_gradient_of_the_literal_loss(clip: Path, frozen: bool) -> None:
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.05)

    task, data = surgery_task(clip, frozen=frozen, optimizer=sgd), memory_data()
    torch.nn.init.normal_(task.adapters.up, std=0.1, generator=torch.Generator().manual_seed(0))
    before = deepcopy(dict(task.learned.named_parameters()))
    batch = {name: next(iter(data._stream(name))) for name in TASKS}
    loss = torch.zeros(())
    for i, name in enumerate(TASKS):
        z, expert = (
            task.backbone.features(task.vectors.merge(matrix), batch[name]["images"])
            for matrix in (task.coefficients(), task.vectors.one_hot(name))
        )
        inner = (z @ task.adapters.down[i].T).relu()
        loss = loss + (z - inner @ task.adapters.up[i].T - expert).abs().mean()
    names, parameters = zip(*task.learned.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    adapt(task, data, 1)
    for name, gradient in zip(names, gradients, strict=True):
        after = task.learned.get_parameter(name).detach()
        assert_close(after, before[name] - 0.05 * gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 1e-4
    assert ("coefficients.values" in names) is not frozen


def test_a_task_alone_trains_its_own_adapter_alone(clip: Path) -> None:
    task, data = surgery_task(clip), memory_data()
    start = {name: value.clone() for name, value in task.adapters.named_parameters()}
    data.tasks = {TASKS[0]: data.tasks[TASKS[0]]}
    adapt(task, data, 2)
    assert not torch.equal(task.adapters.up[0], start["up"][0])
    for name, value in task.adapters.named_parameters():
        assert torch.equal(value[1:], start[name][1:])


def test_experts_are_not_adapted(trained: tuple[MergeTask, list[float], Path]) -> None:
    task, images = trained[0], noise(4, 9)
    features = task.expert_features(TASKS[0], images)
    assert torch.equal(task.expert_logits(TASKS[0], images), task.heads[TASKS[0]].logits(features))


def test_what_is_exported_predicts_as_what_was_trained(trained: tuple[MergeTask, list[float], Path]) -> None:
    task, _, folder = trained
    model, images = load(folder), noise(6, 9)
    for name in TASKS:
        assert_close(model(images.images, name), task.merged_logits(name, images), rtol=1e-5, atol=1e-5)
    shares = model(images.images, TASKS[0]) - task.heads[TASKS[0]].logits(model.features(images.images, None))
    assert shares.abs().max() > 1e-3  # the adapters say something
    plain = open_checkpoint(folder, role="model")
    assert set(plain) == set(task.merged_state())


def test_evaluation_with_the_task_known_and_unknown_reads_adapted_features(
    trained: tuple[MergeTask, list[float], Path],
) -> None:
    task = trained[0]
    found = task.evaluation()
    for name in TASKS:
        images = task.data.test(name)
        logits = {head: task.merged_logits(head, images) for head in TASKS}
        hits = (logits[name].argmax(-1) == images.labels).double().mean()
        assert found.known[name] == pytest.approx(100 * float(hits))
        union = torch.cat(list(logits.values()), -1).argmax(-1)
        before = sum(logits[head].shape[-1] for head in TASKS[: TASKS.index(name)])
        assert found.unknown[name] == pytest.approx(
            100 * float((union == images.labels + before).double().mean())
        )


def test_a_resumed_run_ends_where_an_unbroken_one_does(clip: Path, tmp_path: Path) -> None:
    whole = surgery_task(clip, frozen=False)
    adapt(whole, memory_data(), 3)
    first, path = make_trainer(2, max_epochs=-1), tmp_path / "a.ckpt"
    first.fit(surgery_task(clip, frozen=False), datamodule=memory_data())
    first.save_checkpoint(path)
    resumed = surgery_task(clip, frozen=False)
    make_trainer(3, max_epochs=-1).fit(resumed, datamodule=memory_data(), ckpt_path=path)
    assert same(resumed, whole)
    with pytest.raises(InputError, match=r"other adapters: it has rank 4; here are rank 5"):
        make_trainer(3).fit(surgery_task(clip, adapters=Surgery(5)), datamodule=memory_data(), ckpt_path=path)


def same(a: MergeTask, b: MergeTask) -> bool:
    theirs: dict[str, Tensor] = b.learned.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.learned.state_dict().items())


def test_after_a_loss_that_is_not_finite_the_last_good_adapters_are_back(clip: Path) -> None:
    class Bomb(FeatureMatching):
        def forward(self, logits, task, teacher=None):
            loss = super().forward(logits, task, teacher)
            return loss * float("nan") if self.steps == 2 else loss

        def begin_step(self) -> None:
            self.steps = getattr(self, "steps", -1) + 1

    task, short = surgery_task(clip, objective=Bomb()), surgery_task(clip)
    with pytest.raises(NumericError, match="loss of task"):
        adapt(task, memory_data(), 4)
    adapt(short, memory_data(), 1)
    assert same(task, short)


def test_the_selector_rolls_adapters_back_too(clip: Path) -> None:
    task = surgery_task(clip, optimizer=lambda p: torch.optim.SGD(p, lr=1e4))
    start = deepcopy(task.learned.state_dict())
    selector = Selector(1, lost_agreement=-1.0, keep="last")  # whatever happens is a collapse
    with pytest.warns(match="rolled back to step 0"):
        adapt(task, memory_data(n_adapt=160), 2, selector)
    assert all(torch.equal(value, start[name]) for name, value in task.learned.state_dict().items())


def test_combinations_that_make_no_sense_are_refused(clip: Path) -> None:
    with pytest.raises(InputError, match="adapters need static coefficients"):
        make_task(clip, Router(), adapters=Surgery())
    with pytest.raises(InputError, match="rank=0 is out of range"):
        Surgery(0)
    with pytest.raises(InputError, match="FrankWolfe needs one matrix"):
        make_trainer(1).fit(surgery_task(clip, optimizer=FrankWolfe), datamodule=memory_data())
