"""Recalibration of BatchNorm: torch's own training mode is the oracle."""

from pathlib import Path

import pytest
import timm
import torch
from tiny_networks import write_timm
from torch import nn
from torch.testing import assert_close

from adamerge.checkpoints import open_checkpoint
from adamerge.errors import AdamergeWarning, InputError
from adamerge.models import ModuleBackbone
from adamerge.models.recalibration import recalibrate
from adamerge.models.timm import TimmBackbone

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    write_timm(folder, "resnet")
    return folder


@pytest.fixture
def weights(folder: Path) -> State:
    return dict(open_checkpoint(folder))


def images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)


def test_one_batch_gives_what_training_mode_gives(folder: Path, weights: State) -> None:
    backbone = TimmBackbone(folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).train()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0  # the statistics become this batch's
    with torch.no_grad():
        model((images(12) / 255 - backbone.mean) / backbone.std)
    found, expected = recalibrate(backbone, weights, {"a": images(12)}), model.state_dict()
    statistics = [name for name in weights if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 2 * len(norms)
    for name in statistics:
        assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(found[name], weights[name]) for name in weights if name not in statistics)


def test_batches_are_joined_exactly(weights: State) -> None:
    """Behind one layer nothing depends on the batch, so many batches must give the moments of all."""
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768))
    backbone = ModuleBackbone(module)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parts = {"a": images(40), "b": images(24, seed=1)}
    found = recalibrate(backbone, state, parts, batch_size=10)
    rows = torch.cat([*parts.values()]).flatten(1) / 255
    assert_close(found["1.running_mean"], rows.mean(0))
    assert_close(found["1.running_var"], rows.var(0))


def test_it_heals_shrunken_statistics(folder: Path, weights: State) -> None:
    backbone, inputs = TimmBackbone(folder), images(64)
    weights["bn1.running_var"] = weights["bn1.running_var"] * 0 - 1  # no valid model
    found = recalibrate(backbone, weights, {"a": inputs}, batch_size=64)
    seen = []
    handle = backbone.module.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    backbone.features(found, inputs)
    handle.remove()
    assert_close(found["bn1.running_mean"], seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_backbone_and_given_weights_stay_as_they_are(folder: Path, weights: State) -> None:
    backbone, before = TimmBackbone(folder), {name: tensor.clone() for name, tensor in weights.items()}
    first = backbone.features(weights, images(2))
    recalibrate(backbone, weights, {"a": images(8)})
    assert torch.equal(backbone.features(weights, images(2)), first)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


def test_the_seed_decides_on_the_batches(folder: Path, weights: State) -> None:
    backbone = TimmBackbone(folder)
    runs = [recalibrate(backbone, weights, {"a": images(16)}, batch_size=4, seed=s) for s in (0, 0, 1)]
    last = [run["layer4.0.bn2.running_mean"] for run in runs]
    assert torch.equal(last[0], last[1])
    assert not torch.equal(last[0], last[2])


def test_a_model_without_such_layers_is_told(weights: State) -> None:
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    with pytest.warns(AdamergeWarning, match="no BatchNorm layer to recalibrate"):
        assert recalibrate(ModuleBackbone(nn.Linear(2, 2)), state, {"a": images(2)}) == state


def test_a_single_image_is_refused(folder: Path, weights: State) -> None:
    with pytest.raises(InputError, match="1 images cannot tell a variance"):
        recalibrate(TimmBackbone(folder), weights, {"a": images(1)})
