"""Paths through blocks: found in every family, equal to networks that are built by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZE, TASKS
from hub_mirror import write_base
from tiny_networks import images, make_hf, texts, write_hf, write_timm
from torch import Tensor, nn

from adamerge import InputError, Mixture, TaskVectors, load, open_backbone, save_mixture
from adamerge.checkpoints import open_checkpoint
from adamerge.dataflow import Flow, FlowBackbone, Step, find_blocks, flow_weights
from adamerge.models import Head, ModuleBackbone

Chosen = list[Step]


def two_blocks_a_stage() -> Any:
    config = images("ConvNext")
    config.depths = [2, 2, 2, 2]
    return config


FAMILIES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "Hugging Face CLIP": ("encoder.layers", write_base),
    "timm": ("blocks", lambda folder: write_timm(folder, "vit")),
    "ViT": ("layers", lambda folder: write_hf(folder, make_hf(images("ViT")))),
    "Bert": ("encoder.layer", lambda folder: write_hf(folder, make_hf(texts("Bert")))),
}
STAGED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "timm ResNet": (r"keeps the shape .*layer1.0 makes", lambda folder: write_timm(folder, "resnet")),
    "ResNet": (
        r"keeps the shape .*stages\.1 makes",
        lambda folder: write_hf(folder, make_hf(images("ResNet"))),
    ),
    "ConvNext": (
        "in several places",
        lambda folder: write_hf(folder, make_hf(two_blocks_a_stage())),
    ),
}


def inputs_of(backbone: ModuleBackbone) -> Tensor:
    if backbone.modality == "text":
        return torch.stack([backbone.preprocess(text) for text in ("a b c", "good red")])
    from PIL import Image

    shape = backbone.preprocess(Image.new("RGB", (40, 40))).shape
    return torch.randint(0, 256, (2, *shape), generator=torch.manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_and_run_in_order_are_the_model_itself(tmp_path: Path, family: str) -> None:
    ending, write = FAMILIES[family]
    write(tmp_path)
    backbone, weights = open_backbone(tmp_path), open_checkpoint(tmp_path)
    inputs = inputs_of(backbone)
    before = backbone.features(weights, inputs)
    blocks = find_blocks(backbone, weights, inputs)
    assert blocks.endswith(ending)
    state = {name: weights[name] for name in backbone.names}
    given = flow_weights(backbone, blocks, [state, {name: x + 0.1 for name, x in state.items()}])
    same = FlowBackbone(backbone, Flow(blocks, (Step(0, 0), Step(0, 1))))
    other = FlowBackbone(backbone, Flow(blocks, (Step(0, 0), Step(1, 1, 0.9), Step(0, 1))))
    assert torch.equal(same.features(given, inputs), before)
    assert not torch.allclose(other.features(given, inputs), before)
    assert torch.equal(backbone.features(weights, inputs), before)


class Cutting(nn.Module):
    """Runs as many blocks as it was made with, as some encoders do."""

    def __init__(self, *, cuts: bool) -> None:
        super().__init__()
        self.layers, self.cut = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)), 2 if cuts else None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: self.cut]:
            x = layer(x)
        return x


def test_networks_that_cut_longer_paths_are_refused() -> None:
    for cuts in (False, True):
        backbone = ModuleBackbone(Cutting(cuts=cuts))
        given = dict(backbone.module.state_dict()), torch.randn(2, 3)
        if not cuts:
            assert find_blocks(backbone, *given) == "layers"
            continue
        with pytest.raises(InputError, match="Cutting runs 2 blocks, however many its layers has"):
            find_blocks(backbone, *given)


@pytest.mark.parametrize("family", STAGED)
def test_networks_whose_shapes_change_are_refused(tmp_path: Path, family: str) -> None:
    reason, write = STAGED[family]
    write(tmp_path)
    backbone = open_backbone(tmp_path)
    with pytest.raises(InputError, match=reason):
        find_blocks(backbone, open_checkpoint(tmp_path), inputs_of(backbone))
    assert not any(part._forward_hooks for part in backbone.module.modules())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden).tanh()


class Scaled(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return 0.7 * hidden


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks = nn.Sequential(*(Block() for _ in range(3)))
    return nn.Sequential(nn.Linear(4, 5), blocks, nn.Linear(5, 2)).requires_grad_(False)


A, B, INPUTS = network(0), network(1), torch.linspace(-1, 1, 12).reshape(3, 4)
(A0, A1, A2), B1 = A[1], B[1][1]
PATHS: dict[str, tuple[Chosen, list[nn.Module]]] = {
    "without the second block": ([Step(0, 0), Step(0, 2)], [A0, A2]),
    "the first twice": ([Step(0, 0), Step(0, 0), Step(0, 1), Step(0, 2)], [A0, A0, A1, A2]),
    "in another order": ([Step(0, 2), Step(0, 0)], [A2, A0]),
    "a block of the other model": ([Step(0, 0), Step(1, 1), Step(0, 2)], [A0, B1, A2]),
    "a scale": ([Step(0, 0), Step(0, 1, 0.7)], [A0, Scaled(), A1]),
    "two scales of one block": (
        [Step(1, 1, 0.7), Step(1, 1), Step(1, 1, 0.7)],
        [Scaled(), B1, B1, Scaled(), B1],
    ),
}


def states() -> list[dict[str, Tensor]]:
    return [{f"body.{n}": x.clone() for n, x in model.state_dict().items()} for model in (A, B)]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_the_network_built_by_hand(path: str) -> None:
    steps, blocks = PATHS[path]
    module = network(2)  # its own values must not matter
    backbone = ModuleBackbone(module, prefix="body.")
    assert find_blocks(backbone, states()[0], INPUTS) == "1"
    flow = FlowBackbone(backbone, Flow("1", tuple(steps)))
    expected = nn.Sequential(A[0], *blocks, A[2])(INPUTS)
    assert torch.equal(flow.features(flow_weights(backbone, "1", states()), INPUTS), expected)
    assert str(module) == str(network(2))
    assert all(torch.equal(x, y) for x, y in zip(module.parameters(), network(2).parameters(), strict=True))


@pytest.mark.parametrize(
    ("flow", "reason"),
    [
        (Flow("1", ()), "no block is included"),
        (Flow("1", (Step(0, 3),)), "no block 3: 1 has 3"),
        (Flow("trunk", (Step(0, 0),)), "no blocks 'trunk'"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(flow: Flow, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        FlowBackbone(ModuleBackbone(network(0)), flow)


def test_a_saved_path_loads_as_it_is(clip: Path, tmp_path: Path) -> None:
    backbone = open_backbone(clip / "base")
    expert = open_checkpoint(clip / "experts" / f"{TASKS[0]}.safetensors")
    base = open_checkpoint(clip / "base")
    inputs = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    blocks = find_blocks(backbone, base, inputs)
    given = flow_weights(backbone, blocks, [base, expert])
    flow = FlowBackbone(backbone, Flow(blocks, (Step(0, 1), Step(1, 0, 0.8), Step(0, 1))))
    heads = {"cars": Head(torch.randn(4, 12))}
    state = {name: given[name] for name in flow.names}
    mixture = Mixture(TaskVectors((), {}, state, None), flow, heads, None, {"cars": list("abcd")})
    save_mixture(mixture, tmp_path / "out", like=clip / "base")
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded.logits(inputs, "cars"), heads["cars"].logits(flow.features(given, inputs)))
    assert load(tmp_path / "out", backbone).predict(inputs).task == ["cars"] * 3
