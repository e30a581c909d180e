"""The contract of backbones. A new one subclasses `BackboneContract` and gives two methods."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import open_clip
import pytest
import timm
import torch
import transformers
from conftest import SIZE, draw
from hub_mirror import MEAN, STD, write_base
from tiny_networks import images, make_hf, write_hf, write_timm
from torch import Tensor, nn
from torch.testing import assert_close

from adamerge.checkpoints import open_checkpoint
from adamerge.dataflow import Flow, FlowBackbone, Step, flow_weights
from adamerge.errors import InputError
from adamerge.models import Backbone, ModuleBackbone, OpenClipBackbone, open_backbone
from adamerge.state import State


class Case(NamedTuple):
    backbone: Backbone
    weights: State
    inputs: Tensor


class BackboneContract:
    def case(self) -> Case:
        raise NotImplementedError

    def literal(self, weights: State, inputs: Tensor) -> Tensor:
        """Give the features as the plain library computes them."""
        raise NotImplementedError

    def test_it_equals_the_plain_library(self) -> None:
        backbone, weights, inputs = self.case()
        assert_close(backbone.features(weights, inputs), self.literal(weights, inputs))

    def test_it_reads_the_weights_it_names_and_no_others(self) -> None:
        backbone, weights, inputs = self.case()
        before = backbone.features(weights, inputs)
        others = {n: torch.full_like(w, torch.nan) for n, w in weights.items() if n not in backbone.names}
        assert others, "the case needs a tensor that the backbone does not read"
        assert torch.equal(backbone.features({**weights, **others}, inputs), before)
        assert set(backbone.names) <= set(weights)

    def test_a_missing_weight_is_refused_or_the_modules_own(self) -> None:
        """Never does a module compute with memory that nobody has written."""
        backbone, weights, inputs = self.case()
        for name in backbone.names:
            rest = {n: w for n, w in weights.items() if n != name}
            with suppress(InputError):
                assert_close(backbone.features(rest, inputs), backbone.features(weights, inputs))

    def test_every_named_weight_gets_a_gradient(self) -> None:
        backbone, weights, inputs = self.case()
        leaves = {name: weights[name].clone().requires_grad_() for name in backbone.names}
        backbone.features({**weights, **leaves}, inputs).square().sum().backward()
        assert not [name for name, leaf in leaves.items() if leaf.grad is None]

    def test_calls_leave_no_trace(self) -> None:
        backbone, weights, inputs = self.case()
        before = backbone.features(weights, inputs)
        backbone.features({n: w + 1 for n, w in weights.items()}, inputs)
        assert torch.equal(backbone.features(weights, inputs), before)

    def test_images_do_not_influence_each_other(self) -> None:
        backbone, weights, inputs = self.case()
        one_by_one = torch.cat([backbone.features(weights, i[None]) for i in inputs])
        assert_close(backbone.features(weights, inputs), one_by_one)

    def test_a_preprocessed_picture_is_an_input(self) -> None:
        backbone, weights, inputs = self.case()
        tensor = backbone.preprocess(draw(1, 0))
        assert (tensor.dtype, tensor.shape) == (inputs.dtype, inputs.shape[1:])
        assert backbone.features(weights, tensor[None]).dim() == 2

    def test_a_view_in_floats_is_the_same_input(self) -> None:
        backbone, weights, inputs = self.case()
        if inputs.dtype != torch.uint8:
            return
        found = backbone.features(weights, backbone.normalised(inputs.float()))
        assert_close(found, backbone.features(weights, inputs))

    def test_moving_keeps_the_features(self) -> None:
        backbone, weights, inputs = self.case()
        before = backbone.features(weights, inputs)
        assert torch.equal(backbone.to(torch.device("cpu")).features(weights, inputs), before)


def uint8_images(count: int = 3, size: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    write_base(folder)
    return folder


class TestModule(BackboneContract):
    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 7), nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(6))

    def case(self) -> Case:
        module = self.module()
        module(torch.zeros(1, 3, SIZE, SIZE))
        self.weights = {"body." + n: p.detach() for n, p in module.named_parameters()}
        backbone = ModuleBackbone(
            module,
            prefix="body.",
            mean=[0.5],
            std=[0.25],
            preprocess=lambda picture: uint8_images(1)[0],
        )
        return Case(backbone, self.weights | {"head.weight": torch.ones(2)}, uint8_images())

    def literal(self, weights: State, inputs: Tensor) -> Tensor:
        module = self.module().eval()
        module.load_state_dict({n[5:]: w for n, w in weights.items() if n.startswith("body.")})
        return module((inputs / 255 - 0.5) / 0.25)


class TestOpenClip(BackboneContract):
    @pytest.fixture(autouse=True)
    def _base(self, clip: Path) -> None:
        self.base = clip / "base"

    def case(self) -> Case:
        return Case(OpenClipBackbone(self.base), dict(open_checkpoint(self.base)), uint8_images())

    def literal(self, weights: State, inputs: Tensor) -> Tensor:
        model = open_clip.create_model(f"local-dir:{self.base}").eval()
        mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
        with torch.no_grad():
            return model.encode_image((inputs / 255 - mean[:, None, None]) / std[:, None, None])


class TestFlow(TestOpenClip):
    """A path through the blocks of model A, in order, is model A."""

    def case(self) -> Case:
        backbone, state = OpenClipBackbone(self.base), dict(open_checkpoint(self.base))
        blocks = "transformer.resblocks"
        flow = FlowBackbone(backbone, Flow(blocks, (Step(0, 0), Step(0, 1))))
        weights = flow_weights(backbone, blocks, [state])
        used = {name: weights[name] for name in flow.names}
        return Case(flow, used | {"head.weight": torch.ones(2)}, uint8_images())


class TestTimm(BackboneContract):
    @pytest.fixture(autouse=True)
    def _base(self, tmp_path: Path) -> None:
        self.base = tmp_path
        write_timm(tmp_path, "vit")

    def case(self) -> Case:
        inputs = torch.cat([uint8_images(), uint8_images()], -1)[..., :16].repeat(1, 1, 2, 1)[:, :, :16]
        return Case(open_backbone(self.base), dict(open_checkpoint(self.base)), inputs)

    def literal(self, weights: State, inputs: Tensor) -> Tensor:
        model = timm.create_model(f"local-dir:{self.base}", pretrained=True).eval()
        with torch.no_grad():
            return model.forward_head(model.forward_features((inputs / 255 - 0.5) / 0.5), pre_logits=True)


class TestHFEncoder(BackboneContract):
    @pytest.fixture(autouse=True)
    def _base(self, tmp_path: Path) -> None:
        self.base, self.model = tmp_path, make_hf(images("ViT"))
        write_hf(tmp_path, self.model)

    def case(self) -> Case:
        return Case(open_backbone(self.base), dict(open_checkpoint(self.base)), uint8_images())

    def literal(self, weights: State, inputs: Tensor) -> Tensor:
        mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
        with torch.no_grad():
            pixels = (inputs / 255 - mean[:, None, None]) / std[:, None, None]
            return self.model.vit(pixels).last_hidden_state[:, 0]


class TestHuggingFaceClip(BackboneContract):
    """A complete CLIP: its image tower is read, and the projection."""

    @pytest.fixture(autouse=True)
    def _base(self, hugging_face: Path) -> None:
        self.base = hugging_face

    def case(self) -> Case:
        return Case(open_backbone(self.base), dict(open_checkpoint(self.base)), uint8_images(size=32))

    def literal(self, weights: State, inputs: Tensor) -> Tensor:
        model = transformers.CLIPModel.from_pretrained(self.base).eval()
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        with torch.no_grad():
            return model.get_image_features((inputs / 255 - mean) / std).pooler_output
