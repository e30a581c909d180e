"""MergeTask: what a step does, what it refuses, and what never reaches it."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from builders import adapt, make_task, make_trainer, memory_data, noise
from conftest import TASKS
from torch import Tensor

from adamerge import Entropy, InputError, KLTeacher, Learned, ReliableEntropy, SharpnessAware
from adamerge.errors import AdamergeWarning, NumericError
from adamerge.mixture import shared_passes
from adamerge.models import predict_all
from adamerge.objectives import Objective


def adam(rate: float):
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def literal_adaptation(task, data, steps: int, rate: float) -> Tensor:
    """Layer-wise AdaMerging as the paper writes it: one graph through the merge, all losses summed."""
    values = torch.full((len(TASKS), len(task.vectors.names)), 0.3, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=rate)
    streams = {name: iter(data._stream(name)) for name in TASKS}
    for _ in range(steps):
        weights = task.vectors.merge(values)
        loss = torch.zeros(())
        for name, stream in streams.items():
            logits = task.heads[name].logits(task.backbone.features(weights, next(stream)["images"]))
            log_p = logits.log_softmax(-1)
            loss = loss - (log_p.exp() * log_p).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return values.detach()


@pytest.mark.parametrize("images_per_pass", [1, 8, 1000])
def test_equals_the_literal_algorithm(clip: Path, images_per_pass: int) -> None:
    task = make_task(clip, optimizer=adam(1e-2), images_per_pass=images_per_pass)
    learned = adapt(task, memory_data(), 5)
    expected = literal_adaptation(make_task(clip), memory_data(), 5, 1e-2)
    torch.testing.assert_close(learned, expected, rtol=0, atol=2e-6)
    assert (learned - 0.3).abs().max() > 0.02


def test_labels_cannot_reach_adaptation(clip: Path) -> None:
    honest, lying = memory_data(), memory_data()
    for name in TASKS:
        images = lying._loaded[name, "test"]
        lying._loaded[name, "test"] = type(images)(images.images, 1 - images.labels.clamp(max=1))
    a, b = (adapt(make_task(clip), data, 4) for data in (honest, lying))
    assert torch.equal(a, b)
    batch = next(iter(honest._stream(TASKS[0])))
    assert set(batch) == {"images", "index"}


def test_same_seed_same_numbers_and_other_seed_others(clip: Path) -> None:
    first, again, other = (adapt(make_task(clip), memory_data(seed=s), 4) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_expert_at_coefficient_one_is_that_expert(clip: Path) -> None:
    task = make_task(clip, Learned(grouping="task", initial=[1.0, 0.0, 0.0]))
    merged = task.merged_state()
    expert = task.vectors.merge(task.vectors.one_hot(TASKS[0]))
    assert all(torch.equal(merged[name], expert[name]) for name in expert)


def test_reliable_entropy_without_filter_sharpness_and_recovery_is_plain_entropy(clip: Path) -> None:
    def flat(parameters):
        return SharpnessAware(parameters, base=adam(1e-2), rho=0.0)

    plain = adapt(make_task(clip, objective=Entropy(), optimizer=adam(1e-2)), memory_data(), 4)
    objective = ReliableEntropy(threshold=1e9, recovery=0.0)
    reliable = adapt(make_task(clip, objective=objective, optimizer=flat), memory_data(), 4)
    torch.testing.assert_close(plain, reliable, rtol=0, atol=0)


def test_without_reliable_images_nothing_moves(clip: Path) -> None:
    task = make_task(clip, objective=ReliableEntropy(threshold=1e-9), optimizer=adam(1e-2))
    with pytest.warns(AdamergeWarning, match=r"no image worth a step of \['bars', 'circles', 'dots'\]"):
        learned = adapt(task, memory_data(), 4)
    assert torch.equal(learned, torch.full_like(learned, 0.3))
    assert task.losses == {}


def test_steps_that_gather_several_batches_are_refused(clip: Path) -> None:
    with pytest.raises(InputError, match="a step is one batch of every task"):
        adapt(make_task(clip), memory_data(), 1, accumulate_grad_batches=2)


def test_recovery_goes_back_and_forgets_the_moments(clip: Path) -> None:
    task = make_task(clip, objective=ReliableEntropy(threshold=1e9, recovery=1e9), optimizer=adam(1e-2))
    trainer = make_trainer(1)
    trainer.fit(task, datamodule=memory_data())
    assert torch.equal(task.coefficients.values, torch.full_like(task.coefficients.values, 0.3))
    assert len(trainer.optimizers[0].state) == 0


def test_teacher_kl_is_zero_where_the_merge_is_the_expert(clip: Path) -> None:
    task = make_task(clip, Learned("task", [1.0, 0.0, 0.0]), objective=KLTeacher())
    adapt(task, memory_data(), 1)
    assert task.losses[TASKS[0]] == pytest.approx(0, abs=1e-6)
    assert all(task.losses[name] > 1e-5 for name in TASKS[1:])


def test_projected_coefficients_stay_in_the_unit_interval(clip: Path) -> None:
    task = make_task(clip, Learned("tensor", 0.01, "projected"), optimizer=adam(0.5))
    learned = adapt(task, memory_data(), 4)
    assert learned.min() >= 0
    assert learned.max() <= 1


@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_half_precision_vectors_learn_nearly_the_same(clip: Path, codec: str) -> None:
    exact = adapt(make_task(clip, optimizer=adam(1e-2)), memory_data(), 4)
    rounded = adapt(make_task(clip, optimizer=adam(1e-2), codec=codec), memory_data(), 4)
    assert (exact - rounded).abs().mean() < 2e-3


def test_bf16_autocast_keeps_coefficients_and_logits_in_fp32(clip: Path) -> None:
    class Recorder(Entropy):
        def forward(self, logits, task, teacher=None):
            dtypes.append((logits.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(logits, task, teacher)

    dtypes: list[tuple[torch.dtype, bool]] = []
    task = make_task(clip, objective=Recorder(), optimizer=adam(1e-2))
    adapt(task, memory_data(), 3, precision="bf16-mixed")
    assert {dtype for dtype, _ in dtypes} == {torch.float32}
    assert any(autocast for _, autocast in dtypes)
    assert task.coefficients.values.dtype == torch.float32


def test_a_loss_scaler_changes_nothing_but_rounding(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_task(clip, optimizer=adam(1e-2))
    scaled = make_task(clip, optimizer=adam(1e-2))
    monkeypatch.setattr(scaled, "_loss_scale", lambda: 1024.0)
    torch.testing.assert_close(
        adapt(plain, memory_data(), 3), adapt(scaled, memory_data(), 3), rtol=0, atol=1e-6
    )


class Explodes(Objective):
    """Becomes NaN for one task at one step."""

    def __init__(self, task: str, step: int) -> None:
        super().__init__()
        self.task, self.step, self.steps = task, step, -1

    def begin_step(self) -> None:
        self.steps += 1

    def forward(self, logits, task, teacher=None):
        bad = task == self.task and self.steps == self.step
        return logits.mean() * (float("nan") if bad else 1.0)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_coefficients(clip: Path) -> None:
    good = adapt(make_task(clip, objective=Explodes("nobody", 0)), memory_data(), 1)  # step 2 never proved
    task = make_task(clip, objective=Explodes("bars", 2))
    with pytest.raises(NumericError, match=r"step 2: the loss of task 'bars' is nan"):
        adapt(task, memory_data(), 9)
    assert torch.equal(task.coefficients.table()[1], good)


def test_coefficients_that_a_step_made_infinite_are_taken_back(clip: Path) -> None:
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["params"][0].data.fill_(float("inf"))

    task = make_task(clip, optimizer=lambda parameters: Breaks(parameters, lr=1.0))
    with pytest.raises(NumericError, match="a coefficient is not finite after the optimizer's step"):
        adapt(task, memory_data(), 3)
    assert torch.equal(task.coefficients.values, torch.full_like(task.coefficients.values, 0.3))


def test_a_gradient_that_is_not_finite_names_the_expert(clip: Path) -> None:
    class Infinite(Entropy):
        def forward(self, logits, task, teacher=None):
            return (logits.sum() * 0).sqrt() if task == "dots" else super().forward(logits, task)

    with pytest.raises(NumericError, match="gradient of expert 'circles'"):
        adapt(make_task(clip, objective=Infinite()), memory_data(), 2)


def test_evaluation_agrees_with_the_trainer_and_with_plain_arithmetic(clip: Path) -> None:
    task, data = make_task(clip), memory_data(n_test=30)
    trainer = make_trainer(1)
    trainer.test(task, datamodule=data, verbose=False)
    weights = task.vectors.merge(task.vectors.uniform(0.3))
    for name in TASKS:
        images = data.test(name)
        logits = predict_all(weights, task.backbone, task.heads[name], data.loader(images))
        right = int((logits.argmax(1) == images.labels).sum())
        assert task.accuracy[name] == pytest.approx(100 * right / 30)
    assert task.evaluate() == pytest.approx(task.accuracy)
    assert set(task.evaluate_experts()) == set(TASKS)


def test_validation_measures_entropy_on_held_out_images_only(clip: Path) -> None:
    task, data = make_task(clip), memory_data(n_adapt=20)
    trainer = make_trainer(1, limit_val_batches=None)
    (measured, *_) = trainer.validate(task, datamodule=data, verbose=False)
    held = data.held_out("dots")
    assert len(held) == 4
    log_p = task.merged_logits("dots", held).log_softmax(-1)
    assert measured["val/entropy/dots"] == pytest.approx(
        float(-(log_p.exp() * log_p).sum(1).mean()), rel=1e-4
    )


def test_prediction_gives_class_and_probability_of_every_image(clip: Path) -> None:
    task, data = make_task(clip), memory_data(n_test=7)
    batches = make_trainer(1).predict(task, datamodule=data)
    assert [len(batch["index"]) for (batch,) in batches] == [7, 7, 7]
    assert all(((batch["probability"] > 0) & (batch["probability"] <= 1)).all() for (batch,) in batches)


def test_checkpoints_hold_coefficients_and_optimizer_only(clip: Path, tmp_path: Path) -> None:
    task = make_task(clip)
    trainer = make_trainer(3)
    trainer.fit(task, datamodule=memory_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").stat().st_size < 40_000
    assert set(torch.load(tmp_path / "a.ckpt")["state_dict"]) == {"coefficients.values"}


def test_a_checkpoint_of_other_groups_or_weights_is_refused(clip: Path, tmp_path: Path) -> None:
    trainer = make_trainer(1)
    trainer.fit(make_task(clip), datamodule=memory_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="other groups: it has visual"):
        make_trainer(2).fit(make_task(clip, Learned("task")), memory_data(), ckpt_path=tmp_path / "a.ckpt")
    other = make_task(clip)
    other.vectors.digests["dots"] = "other"  # type: ignore[index]  # a dict behind its read-only type
    with pytest.raises(InputError, match="other digests: dots changed"):
        make_trainer(2).fit(other, datamodule=memory_data(), ckpt_path=tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt")
    del content["adamerge"]
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(InputError, match="not written by adamerge"):
        make_trainer(2).fit(make_task(clip), memory_data(), ckpt_path=tmp_path / "foreign.ckpt")


def test_premises_are_checked_before_any_work(clip: Path) -> None:
    task = make_task(clip)
    heads = {name: task.heads[name] for name in TASKS[:2]}
    with pytest.raises(InputError, match=r"data tasks \['dots'\] have no head"):
        adapt(type(task)(task.vectors, task.backbone, heads), memory_data(), 1)
    data = memory_data()
    data.tasks["extra"] = data.tasks["dots"]
    with pytest.raises(InputError, match=r"data tasks \['extra'\] have no expert.*\n.*has no `adapt` images"):
        adapt(make_task(clip), data, 1)
    task.heads["extra"] = task.heads["dots"]  # a head makes no expert: its images would be trained on
    with pytest.raises(InputError, match=r"data tasks \['extra'\] have no expert"):
        adapt(task, data, 1)
    data = memory_data()
    data.tasks["dots"].classes.append("three")
    with pytest.raises(InputError, match="head 'dots' has 2 rows for 3 classes"):
        adapt(make_task(clip), data, 1)
    data.tasks["dots"].classes.pop()
    with pytest.raises(InputError, match="needs a MultiTaskData"):
        make_trainer(1).fit(make_task(clip), train_dataloaders=[0], val_dataloaders=[0])


def test_an_expert_without_images_needs_no_head_and_is_merged_like_others(clip: Path) -> None:
    task, data = make_task(clip, optimizer=adam(1e-2)), memory_data()
    heads = {name: task.heads[name] for name in TASKS[:2]}
    task = type(task)(task.vectors, task.backbone, heads, optimizer=adam(1e-2))
    data.tasks.pop("dots")
    learned = adapt(task, data, 2)
    assert (learned != task.coefficients.initial).any(1).all()
    assert list(task.evaluate()) == list(TASKS[:2])


def test_the_start_is_evaluated_without_a_trace(clip: Path) -> None:
    task, data = make_task(clip, optimizer=adam(1.0)), memory_data(n_test=60)
    make_trainer(1).fit(task, datamodule=data)
    end, learned = task.evaluate(), task.coefficients.table()[1].clone()
    random_state = torch.get_rng_state()
    start = task.evaluate_start()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(task.coefficients.table()[1], learned)
    assert task.evaluate() == end
    task.coefficients.reset()
    assert task.evaluate() == start != end


def test_a_data_set_smaller_than_a_batch_is_walked_again(clip: Path) -> None:
    data = memory_data(n_adapt=3, holdout=0.0)
    with pytest.warns(AdamergeWarning, match="3 adaptation images, fewer than a batch of 4"):
        learned = adapt(make_task(clip, optimizer=adam(1e-2)), data, 3)
    assert torch.isfinite(learned).all()


def test_tasks_of_different_image_sizes_never_share_a_pass() -> None:
    small = {"images": noise(2, 0).images}
    large = {"images": torch.zeros(2, 3, 28, 28, dtype=torch.uint8)}
    passes = list(shared_passes({"circles": small, "bars": small, "dots": large}, 1000))
    assert passes == [["circles", "bars"], ["dots"]]


def test_the_published_optimizer_is_the_default(clip: Path) -> None:
    task = make_task(clip)
    optimizer = task.configure_optimizers()
    assert isinstance(task, pl.LightningModule)
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["lr"] == 1e-3
    assert optimizer.defaults["weight_decay"] == 0
