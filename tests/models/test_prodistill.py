"""ProDistill beside its literal algorithm, and on the blocks of real architectures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_mirror import write_base
from PIL import Image
from small_experts import Setup, mlp, random, two_tasks
from tiny_networks import images, make_hf, write_hf, write_timm
from torch import Tensor, nn
from torch.testing import assert_close

from adamerge import InputError, open_backbone
from adamerge.checkpoints import locate, open_checkpoint
from adamerge.errors import NumericError
from adamerge.models.statistics import Statistics
from adamerge.static import merge
from adamerge.static.prodistill import Student
from adamerge.vectors import TaskVectors


class Block(nn.Module):
    """Gives more than one tensor, writes on its input, and is told something besides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, *, factor: Tensor) -> tuple[Tensor, None]:
        x.mul_(factor)
        return torch.tanh(self.linear(x)) + x, None


class Network(nn.Module):
    """Two blocks between a stem and a matrix that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layers = nn.Linear(6, 4), nn.ModuleList([Block(4), Block(4)])
        self.proj = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x, _ = layer(x, factor=torch.tensor(0.5))
        return x @ self.proj


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup(Network(), two_tasks(6, count=10))


def distilled(setup: Setup, **options: Any) -> dict[str, Tensor]:
    return merge(setup.vectors(), "prodistill", statistics=setup.statistics(batch_size=32), **options)


def literal(setup: Setup, initial: float, lr: float, epochs: int) -> dict[str, Tensor]:
    """Two streams per task, layer after layer, by autograd through the whole merge."""

    def layer(path: str, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        x = x if path == "stem." else 0.5 * x
        y = x @ w[f"{path}weight"].T + w[f"{path}bias"]
        return y if path == "stem." else x + torch.tanh(y)

    merged = {"proj": setup.base["proj"]}
    merged["proj"] = merged["proj"] + initial * sum(
        e["proj"] - merged["proj"] for e in setup.experts.values()
    )
    own, theirs = dict(setup.images), dict(setup.images)
    for path in ("stem.", "layers.0.linear.", "layers.1.linear."):
        names = [f"{path}{part}" for part in ("weight", "bias")]
        vectors = {n: torch.stack([e[n] - setup.base[n] for e in setup.experts.values()]) for n in names}
        values = {n: torch.full_like(v, initial, requires_grad=True) for n, v in vectors.items()}
        theirs = {task: layer(path, x, setup.experts[task]) for task, x in theirs.items()}
        optimizer = torch.optim.Adam(values.values(), lr=lr)
        for _ in range(epochs):
            weights = {n: setup.base[n] + (values[n] * vectors[n]).sum(0) for n in names}
            loss = sum((layer(path, x, weights) - theirs[task]).square().mean() for task, x in own.items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights = {n: (setup.base[n] + (values[n] * vectors[n]).sum(0)).detach() for n in names}
        own = {task: layer(path, x, weights) for task, x in own.items()}
        merged |= weights
    return merged


def test_it_equals_the_literal_algorithm(setup: Setup) -> None:
    with torch.no_grad():  # as a benchmark calls it
        found = distilled(setup, epochs=2, lr=0.1)
    for name, tensor in literal(setup, 0.3, 0.1, 2).items():
        assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    start = distilled(setup, epochs=0)
    assert (found["layers.1.linear.weight"] - start["layers.1.linear.weight"]).abs().max() > 0.01


def test_without_epochs_it_is_task_arithmetic(setup: Setup) -> None:
    expected = merge(setup.vectors(), "task_arithmetic", scale=0.25)
    for name, tensor in distilled(setup, epochs=0, initial=0.25).items():
        assert_close(tensor, expected[name])


def test_one_expert_at_coefficient_one_stays_that_expert() -> None:
    alone = Setup(Network(), {"a": random(5, 6)})
    for name, tensor in distilled(alone, initial=1.0, epochs=3, lr=0.1).items():
        assert torch.equal(tensor, alone.base[name] + (alone.experts["a"][name] - alone.base[name]))


def test_every_blocks_loss_falls(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    students, fit = [], Student.fit
    monkeypatch.setattr(Student, "fit", lambda self, *args: (students.append(self), fit(self, *args)))
    distilled(setup, epochs=20, lr=0.03)
    assert [student.names[0] for student in students] == [f"{n}.weight" for n in NAMES]
    assert all(student.losses[-1] < student.losses[0] for student in students)


NAMES = ("stem", "layers.0.linear", "layers.1.linear")


def test_only_so_many_images_are_read_and_the_seed_orders_the_batches(setup: Setup) -> None:
    blocks = setup.statistics(batch_size=2)["blocks"]
    calls = [*blocks.calls(blocks.units()[0], "a", {}, 3)]
    assert [len(args[0]) for args, _ in calls] == [2, 1]
    first, again, other = (
        merge(setup.vectors(), "prodistill", statistics=setup.statistics(batch_size=2), epochs=1, seed=s)
        for s in (0, 0, 1)
    )
    assert torch.equal(first["stem.weight"], again["stem.weight"])
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def write(kind: str, folder: Path) -> None:
    if kind == "hf_clip":
        write_base(folder)
    elif kind == "hf_convnext":
        write_hf(folder, make_hf(images("ConvNext")))
    else:
        write_timm(folder, kind)


BLOCKS = {
    "open_clip": ["transformer.resblocks.0", "transformer.resblocks.1"],
    "hf_clip": ["vision_model.encoder.layers.0", "vision_model.encoder.layers.1"],
    "hf_convnext": [f"convnext.encoder.stages.{i}" for i in range(4)],
    "vit": ["blocks.0", "blocks.1"],
    "resnet": [f"layer{i}.0" for i in (1, 2, 3, 4)],
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_real_architectures_are_found_and_distilled(
    kind: str, tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = clip / "base" if kind == "open_clip" else tmp_path
    if kind != "open_clip":
        write(kind, folder)
    backbone, state = open_backbone(folder), open_checkpoint(locate(str(folder)))
    base = {name: state[name].float() for name in backbone.names}
    experts = {
        t: {n: x + 0.02 * random(*x.shape, seed=i).abs() for n, x in base.items()} for i, t in enumerate("ab")
    }
    blank = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    shape = backbone.preprocess(blank).shape
    pixels = {t: torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for t in experts}
    statistics = Statistics(backbone, {}, pixels, experts.__getitem__, batch_size=2)
    units = statistics["blocks"].units()
    blocks = [unit.path for unit in units if unit.repeats]
    assert [path for path in blocks if not path.startswith("conv1")] == BLOCKS[kind]  # a deep stem's layers
    assert not any("running" in name for unit in units for name in unit.names)
    students, fit = [], Student.fit
    monkeypatch.setattr(Student, "fit", lambda self, *args: (students.append(self), fit(self, *args)))
    merged = merge(
        TaskVectors.open(base, experts, force=True), "prodistill", statistics=statistics, epochs=4, lr=0.02
    )
    inside = [student for student, unit in zip(students, units, strict=True) if unit.repeats]
    assert all(student.losses[-1] < student.losses[0] for student in inside)
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())


def test_models_without_numbered_blocks_are_refused() -> None:
    plain = Setup(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).append(nn.Identity())[1], two_tasks(6))
    with pytest.raises(InputError, match="Linear has no numbered blocks"):
        distilled(plain)


@pytest.mark.parametrize("options", [{"epochs": -1}, {"shots": 0}, {"lr": 0.0}])
def test_options_out_of_range_are_refused(setup: Setup, options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="leads nowhere"):
        distilled(setup, **options)


def test_a_loss_that_is_not_finite_is_told() -> None:
    broken = Setup(mlp(), two_tasks(6))
    broken.images["b"][0, 0] = torch.nan
    with pytest.raises(NumericError, match=r"the loss of the block of 0.weight is nan"):
        distilled(broken)
