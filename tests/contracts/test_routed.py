"""The contract of per-input merging: one batched pass gives what every sample's own merged model gives.

The reference is literal: merge a model for each sample, run it on that sample alone. A new architecture
subclasses `RoutedContract` and gives its case.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import SIZE, TASKS, nudge, tiny_config, write_clip
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from adamerge.checkpoints import open_checkpoint
from adamerge.models import Backbone, ModuleBackbone, OpenClipBackbone, open_backbone
from adamerge.models.routed import Mixable, RoutedParameter
from adamerge.state import State
from adamerge.vectors import BernoulliCodec, Codec, LowRankCodec, MagnitudeCodec, TaskVectors, rebase
from adamerge.vectors.ternary import TernaryCodec

SAMPLES = 4
FULL = LowRankCodec(fraction=1.0, kernels=True)
CODECS: list[str | Codec] = [
    "fp32",
    "bf16",
    FULL,
    LowRankCodec(fraction=0.25, kernels=True),
    LowRankCodec(rank=2, dtype="bf16"),
    MagnitudeCodec(0.3),
    BernoulliCodec(0.5),
    TernaryCodec(),
]
FEW: list[str | Codec] = ["fp32", CODECS[3]]
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"image_size": SIZE, "patch_size": 7}


class Given:
    """A mixture that does not depend on what the model reads."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    @property
    def n_samples(self) -> int:
        return len(self.table)

    def weights(self, name: str, block: Mixable, rows: Tensor | None) -> Tensor:
        return self.table


class Case(NamedTuple):
    backbone: Backbone
    base: State
    experts: dict[str, State]

    def vectors(self, codec: str | Codec = "fp32") -> TaskVectors:
        names = set(self.backbone.names)
        return TaskVectors.open(self.base, self.experts, codec, names=names, allow_missing=["*"], force=True)


def uint8_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


def routed(case: Case, vectors: TaskVectors, table: Tensor, images: Tensor | None = None) -> Tensor:
    """One pass over the batch."""
    images = uint8_images(len(table)) if images is None else images
    mixing = Given(table)
    weights = {name: RoutedParameter.make(name, block, mixing) for name, block in vectors.blocks.items()}
    return case.backbone.features(case.base | weights, images)


def literal(case: Case, vectors: TaskVectors, table: Tensor) -> Tensor:
    """A model and a pass for every sample."""
    columns = [weights[:, None].expand(-1, len(vectors.names)) for weights in table]
    models = [case.base | vectors.merge(column) for column in columns]
    pairs = zip(models, uint8_images(len(table)), strict=True)
    return torch.cat([case.backbone.features(model, image[None]) for model, image in pairs])


def mixtures(kind: str, count: int = SAMPLES) -> Tensor:
    table = torch.randn(count, len(TASKS), generator=torch.Generator().manual_seed(2))
    return {
        "random": table,
        "one-hot": torch.eye(len(TASKS))[torch.arange(count) % len(TASKS)],
        "sparse": table.relu() * (torch.arange(len(TASKS)) != 1),  # one task is of no use to the batch
        "zero": torch.zeros_like(table),
        "equal": table[:1].expand(count, -1),
    }[kind]


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare on the scale of the largest entry."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def without_statistics(vectors: TaskVectors) -> TaskVectors:
    """Leave out running statistics: torch has no gradient of them, so the reference has none."""
    kept = {name: block for name, block in vectors.blocks.items() if "running_" not in name}
    return replace(vectors, blocks=kept)


class RoutedContract:
    codecs = FEW

    @classmethod
    def case(cls, folder: Path) -> Case:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tmp_path_factory: pytest.TempPathFactory) -> Case:
        return cls.case(tmp_path_factory.mktemp("routed"))

    @pytest.fixture(scope="class")
    @classmethod
    def stored(cls, made: Case) -> list[TaskVectors]:
        return [made.vectors(codec) for codec in cls.codecs]

    @pytest.mark.parametrize("kind", ["random", "one-hot", "sparse", "zero", "equal"])
    def test_it_equals_a_merged_model_for_every_sample(
        self, made: Case, stored: list[TaskVectors], kind: str
    ) -> None:
        table = mixtures(kind)
        with torch.no_grad():
            for vectors in stored:
                assert_near(routed(made, vectors, table), literal(made, vectors, table))

    def test_samples_differ_by_their_mixtures(self, made: Case) -> None:
        vectors = made.vectors()
        own, same = (literal(made, vectors, mixtures(kind)) for kind in ("one-hot", "zero"))
        assert ((own - same).abs().amax(1) > 1e-2 * same.abs().max()).all()

    def test_one_sample_is_a_batch(self, made: Case, stored: list[TaskVectors]) -> None:
        table = mixtures("random", 1)
        for vectors in stored:
            assert_near(routed(made, vectors, table), literal(made, vectors, table))

    def test_many_samples_of_few_mixtures_are_a_batch(self, made: Case) -> None:
        table = mixtures("one-hot", 13)
        assert_near(routed(made, made.vectors(), table), literal(made, made.vectors(), table))

    def test_gradients_of_weights_are_those_of_merged_models(
        self, made: Case, stored: list[TaskVectors]
    ) -> None:
        for vectors in map(without_statistics, stored):
            gradients = []
            for way in (routed, literal):
                table = mixtures("random").requires_grad_()
                way(made, vectors, table).square().sum().backward()
                gradients.append(table.grad)
            assert_near(*gradients)

    def test_weights_of_zero_have_gradients(self, made: Case) -> None:
        vectors, table = made.vectors(FULL), mixtures("one-hot").requires_grad_()
        routed(made, vectors, table).square().sum().backward()
        assert (table.grad != 0).all()

    def test_half_precision_errs_as_merged_models_do(self, made: Case, stored: list[TaskVectors]) -> None:
        table = mixtures("random")
        with torch.no_grad():
            for vectors in stored:
                exact = literal(made, vectors, table)
                with torch.autocast("cpu", torch.bfloat16):
                    assert_near(routed(made, vectors, table).float(), exact, 4e-2)

    def test_the_experts_come_back_exactly(self, made: Case) -> None:
        vectors = made.vectors(FULL)
        tasks = vectors.tasks
        found = routed(made, vectors, torch.eye(len(tasks)))
        images = uint8_images(len(tasks))
        experts = [made.base | made.experts[task] for task in tasks]
        pairs = zip(experts, images, strict=True)
        assert_near(found, torch.cat([made.backbone.features(e, image[None]) for e, image in pairs]))

    def test_one_expert_that_is_the_shared_model_stays_it_whatever_the_weights(self, made: Case) -> None:
        one = made._replace(experts={TASKS[0]: made.experts[TASKS[0]]}).vectors()
        expert = one.merge(one.one_hot(TASKS[0]))
        found = routed(made, rebase(one, expert, FULL), mixtures("random")[:, :1])
        assert_near(found, made.backbone.features(made.base | expert, uint8_images(SAMPLES)))

    def test_weights_of_zero_give_the_shared_model(self, made: Case) -> None:
        found = routed(made, made.vectors(FULL), mixtures("zero"))
        assert_near(found, made.backbone.features(made.base, uint8_images(SAMPLES)), 1e-6)


def shaken(state: State, seed: int, size: float = 0.05) -> dict[str, Tensor]:
    """Give a fine-tuned model: every floating tensor moved a little, variances kept positive."""
    generator = torch.Generator().manual_seed(seed)
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    noise = {name: size * torch.randn(t.shape, generator=generator) for name, t in floating.items()}
    return {n: t + (noise[n].abs() if "running_var" in n else noise[n]) for n, t in floating.items()}


def of_module(make: Callable[[], nn.Module]) -> Case:
    """Make a random base and three experts of it."""
    torch.manual_seed(0)
    module = make()
    base = shaken(module.state_dict(), 0)
    experts = {task: shaken(base, seed) for seed, task in enumerate(TASKS, 1)}
    return Case(ModuleBackbone(module, mean=[0.5], std=[0.25]), base, experts)


class TestOpenClip(RoutedContract):
    codecs = CODECS
    config = tiny_config()

    @classmethod
    def case(cls, folder: Path) -> Case:
        write_clip(folder / "base", config=cls.config)
        base = dict(open_checkpoint(folder / "base"))
        experts = {task: nudge(base, seed, 0.05) for seed, task in enumerate(TASKS, 1)}
        return Case(OpenClipBackbone(folder / "base"), base, experts)


class TestOpenClipWithLayerScale(TestOpenClip):
    codecs = FEW
    config = tiny_config(ls_init_value=0.5, pool_type="avg", pos_embed_type="sin_cos_2d")


class Output(nn.Module):
    """A Hugging Face model, and the part of its output that is the feature."""

    def __init__(self, model: nn.Module, part: str) -> None:
        super().__init__()
        self.model, self.part = model, part

    def forward(self, images: Tensor) -> Tensor:
        return getattr(self.model(images), self.part)


class TestHuggingFaceClip(RoutedContract):
    """A folder, as `open_backbone` reads it; attention is torch's own."""

    @classmethod
    def case(cls, folder: Path) -> Case:
        torch.manual_seed(0)
        config = transformers.CLIPVisionConfig(**TINY, projection_dim=12)
        transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
        transformers.CLIPImageProcessorPil().save_pretrained(folder)
        base = shaken(dict(open_checkpoint(folder)), 0)
        experts = {task: shaken(base, seed) for seed, task in enumerate(TASKS, 1)}
        return Case(open_backbone(folder), base, experts)


class TestHuggingFaceClipEager(RoutedContract):
    @classmethod
    def case(cls, folder: Path) -> Case:
        config = transformers.CLIPVisionConfig(**TINY, projection_dim=12, attn_implementation="eager")
        model = transformers.CLIPVisionModelWithProjection(config)
        return of_module(lambda: Output(model, "image_embeds"))


class TestHuggingFaceClipWithoutProjection(RoutedContract):
    @classmethod
    def case(cls, folder: Path) -> Case:
        config = transformers.CLIPVisionConfig(**TINY)
        return of_module(lambda: Output(transformers.CLIPVisionModel(config), "pooler_output"))


class TestHuggingFaceViT(RoutedContract):
    @classmethod
    def case(cls, folder: Path) -> Case:
        config = transformers.ViTConfig(**TINY)
        return of_module(lambda: Output(transformers.ViTModel(config), "pooler_output"))


class TestTimmViT(RoutedContract):
    @classmethod
    def case(cls, folder: Path) -> Case:
        sizes = {"img_size": SIZE, "patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2}
        return of_module(lambda: VisionTransformer(**sizes, num_classes=0, init_values=0.5, reg_tokens=1))


class TestTimmResNet(RoutedContract):
    """Batch normalisation by running statistics, which are merged as well."""

    @classmethod
    def case(cls, folder: Path) -> Case:
        return of_module(
            lambda: ResNet(BasicBlock, (1, 1, 1, 1), channels=(4, 6, 8, 8), num_classes=0, stem_width=4)
        )


class TestTimmConvNeXt(RoutedContract):
    """Depthwise convolutions, layer scale, and activations whose channels come last."""

    @classmethod
    def case(cls, folder: Path) -> Case:
        sizes = {"depths": (1, 1, 1, 1), "dims": (6, 6, 8, 8), "num_classes": 0}
        return of_module(lambda: nn.Sequential(nn.Upsample(32), ConvNeXt(**sizes, ls_init_value=0.5)))


class Mosaic(nn.Module):
    """What stands in no transformer: group norms, dilated, grouped and padded convolutions, embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 1))
        self.norm = nn.GroupNorm(2, 8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding="same", bias=False)
        self.words = nn.Embedding(16, 12)
        self.places = nn.Embedding(4, 12)
        self.scale = nn.Parameter(torch.rand(12))
        self.shift = nn.Parameter(torch.randn(2, 12))
        self.out = nn.Linear(12, 6, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.gelu(self.grouped(self.norm(self.stem(images))))
        words = (images[:, 0, 0, :4] * 4).round().long() % 16
        tokens = x.flatten(2).mT[:, :4] + self.words(words) + self.places(torch.arange(4))
        tokens = self.scale * tokens + self.shift[1].unsqueeze(0)
        return self.out(tokens.mean(1))


class TestPlainModule(RoutedContract):
    @classmethod
    def case(cls, folder: Path) -> Case:
        return of_module(Mosaic)


@pytest.mark.usefixtures("unchecked")  # torch.compile cannot trace the checks of annotations
def test_a_pass_compiles_to_one_graph(tmp_path: Path) -> None:
    class OneLayer(TestOpenClip):
        config = tiny_config(layers=1)

    case = OneLayer.case(tmp_path)
    dense, low_rank = case.vectors("fp32"), case.vectors(LowRankCodec(rank=2))
    mlp = {name: block for name, block in low_rank.blocks.items() if ".mlp." in name}
    vectors, table, images = (
        replace(dense, blocks={**dense.blocks, **mlp}),
        mixtures("random"),
        uint8_images(4),
    )
    compiled = torch.compile(partial(routed, case, vectors), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_near(compiled(table, images), routed(case, vectors, table, images))
