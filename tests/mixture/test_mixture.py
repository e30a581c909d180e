"""Mixtures: their identities, and predictions with the task known and unknown."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, TASKS, draw
from tiny_mixtures import (
    CODECS,
    COMBINED,
    FULL,
    ROUTINGS,
    average,
    backbone_of,
    heads_of,
    literal,
    make_mixture,
    uint8_images,
    vectors_of,
)
from torch import Tensor, nn
from torch.testing import assert_close

from adamerge.coefficients import Oracle, Router, Subspace, Uniform
from adamerge.errors import InputError
from adamerge.mixture import Mixture
from adamerge.models import ModuleBackbone
from adamerge.vectors import Codec, TaskVectors, rebase


@torch.no_grad()
def features(mixture: Mixture, task: str | None = TASKS[0], images: Tensor | None = None) -> Tensor:
    images = uint8_images() if images is None else images
    return mixture.features(images, mixture.gates(images, task))


class TestIdentities:
    @pytest.mark.parametrize("name", ROUTINGS)
    def test_one_expert_that_is_the_shared_model_is_the_answer_to_everything(
        self, clip: Path, name: str
    ) -> None:
        if name in ("top k", "smile"):
            routing = Router(select="top_k", k=1) if name == "top k" else Subspace()
        else:
            routing = ROUTINGS[name]()
        vectors = vectors_of(clip, 1)
        expert = vectors.merge(vectors.one_hot(TASKS[0]))
        mixture = make_mixture(clip, routing, shared=expert, n_tasks=1)
        assert_close(features(mixture), mixture.backbone.features(expert, uint8_images()))

    @pytest.mark.parametrize("codec", ["fp32", FULL], ids=["fp32", "full rank"])
    @pytest.mark.parametrize("task", TASKS)
    def test_the_oracle_gives_each_expert_exactly(self, clip: Path, task: str, codec: str | Codec) -> None:
        vectors = vectors_of(clip)
        expert = vectors.merge(vectors.one_hot(task))
        mixture = make_mixture(clip, Oracle(), codec)
        expected = mixture.backbone.features(expert, uint8_images())
        assert_close(features(mixture, task), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(
            mixture.backbone.features(mixture.shared, uint8_images()), expected, atol=0.05
        )

    @pytest.mark.parametrize("codec", CODECS)
    def test_weights_of_zero_give_the_shared_model(self, clip: Path, codec: str) -> None:
        mixture = make_mixture(clip, Router("bias", select="none", initial=0.0), CODECS[codec])
        expected = mixture.backbone.features(mixture.shared, uint8_images())
        assert_close(features(mixture), expected, rtol=1e-6, atol=1e-6)

    def test_without_routing_it_is_the_shared_model(self, clip: Path) -> None:
        mixture = make_mixture(clip, None)
        assert mixture.gates(uint8_images()) is None
        assert mixture.predict(uint8_images()).weights is None
        expected = mixture.backbone.features(average(vectors_of(clip)), uint8_images())
        assert torch.equal(features(mixture), expected)

    @pytest.mark.parametrize("network", ["bias", "mlp"])
    def test_wemoe_starts_as_task_arithmetic(self, clip: Path, network: str) -> None:
        vectors = vectors_of(clip)
        merged, base = average(vectors), vectors.base_state()
        shared = {name: base[name] if ".mlp." in name else merged[name] for name in vectors.names}
        routing = Router(network, "block", select="none", initial=0.3, groups=r"\.mlp\.")
        mixture = make_mixture(clip, routing, "fp32", shared=shared)
        expected = mixture.backbone.features(merged, uint8_images())
        tolerance = 1e-5 if network == "bias" else 1e-2
        assert_close(features(mixture), expected, rtol=tolerance, atol=tolerance)
        untouched = mixture.backbone.features(mixture.shared, uint8_images())
        assert not torch.allclose(untouched, expected, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize("name", ["linear", "top 1", "oracle", "uniform"])
    def test_a_batch_equals_a_merged_model_for_every_image(self, clip: Path, name: str, codec: str) -> None:
        mixture, images = make_mixture(clip, ROUTINGS[name](), CODECS[codec]), uint8_images()
        with torch.no_grad():
            weights = mixture.gates(images, TASKS[1]).known[""]
            expected = literal(mixture, dict.fromkeys(mixture.vectors.names, weights), images)
        assert_close(features(mixture, TASKS[1]), expected, rtol=1e-5, atol=1e-5)

    def test_tied_weights_stay_tied(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
                self.down.weight = self.up.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.down(torch.tanh(self.up(x)))

        torch.manual_seed(0)
        module = Tied()
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        experts = {}
        for task in TASKS:
            expert = {name: tensor + torch.randn_like(tensor) for name, tensor in state.items()}
            experts[task] = expert | {"down.weight": expert["up.weight"].clone()}
        vectors = TaskVectors.open(state, experts, force=True)
        heads = {task: replace(head, weight=head.weight[:, :6]) for task, head in heads_of().items()}
        merged = average(vectors)
        mixture = Mixture(rebase(vectors, merged, "fp32"), ModuleBackbone(module), heads, Oracle())
        images = torch.randn(5, 6)
        for task in TASKS:
            plain = Tied()
            plain.load_state_dict(experts[task])
            assert_close(features(mixture, task, images), plain(images), rtol=1e-5, atol=1e-5)


class TestRouting:
    def test_the_router_reads_features_of_the_shared_model_at_a_fixed_length(self, clip: Path) -> None:
        mixture, images = make_mixture(clip, Router()), uint8_images()
        found = mixture.router_features(images)
        shared = mixture.backbone.features(mixture.shared, images)
        assert_close(found.norm(dim=1), torch.full((5,), 12**0.5))
        assert_close(torch.cosine_similarity(found, shared), torch.ones(5))
        assert torch.equal(mixture.gates(images).known[""], mixture.routing(found))
        given = mixture.gates(images, router_features=-found)
        assert torch.equal(given.known[""], mixture.routing(-found))

    @pytest.mark.parametrize("name", [n for n in ROUTINGS if n not in ("smile", "oracle", "uniform")])
    def test_predictions_train_the_router(self, clip: Path, name: str) -> None:
        mixture = make_mixture(clip, ROUTINGS[name](), "fp32").train()
        mixture.logits(uint8_images(), TASKS[0]).square().sum().backward()
        gradients = [p.grad for p in mixture.parameters()]
        assert gradients
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)

    def test_only_the_router_is_trained(self, clip: Path) -> None:
        mixture = make_mixture(clip, Router())
        assert [name.split(".")[0] for name, _ in mixture.named_parameters()] == ["routing", "routing"]

    def test_a_pattern_leaves_other_tensors_to_the_shared_model(self, clip: Path) -> None:
        mixture = make_mixture(clip, Router(groups=r"\.mlp\."))
        assert mixture.routed
        assert all(".mlp." in name for name in mixture.routed)
        weights = mixture.gates(uint8_images()).known[""]
        expected = literal(mixture, dict.fromkeys(mixture.routed, weights), uint8_images())
        assert_close(features(mixture), expected, rtol=1e-5, atol=1e-5)


class TestPredict:
    def test_a_known_task_is_classified_by_its_head(self, clip: Path) -> None:
        mixture, images = make_mixture(clip, Router()), uint8_images()
        for task in TASKS:
            found = mixture.predict(images, task)
            logits = mixture.heads[task].logits(features(mixture, task))
            assert found.task == [task] * 5
            assert torch.equal(found.label, logits.argmax(-1))
            assert_close(found.probability, logits.softmax(-1).amax(-1))
            assert found.class_name == [CLASSES[task][label] for label in found.label]
            assert_close(found.weights, mixture.gates(images).known[""])

    def test_an_unknown_task_is_the_one_whose_class_has_the_highest_logit(self, clip: Path) -> None:
        mixture, images = make_mixture(clip, Router()), uint8_images(30)
        found = mixture.predict(images)
        logits = [mixture.heads[task].logits(features(mixture, images=images)) for task in TASKS]
        for i in range(30):
            classes = {
                (t, c): float(logits[k][i, c]) for k, t in enumerate(TASKS) for c in range(len(CLASSES[t]))
            }
            task, label = max(classes, key=classes.__getitem__)
            assert (found.task[i], int(found.label[i])) == (task, label)
            assert found.class_name[i] == CLASSES[task][label]
            share = torch.tensor([*classes.values()]).softmax(0).max()
            assert float(found.probability[i]) == pytest.approx(float(share), rel=1e-5)
        assert len(set(found.task)) > 1

    @pytest.mark.parametrize(("name", "codec"), COMBINED)
    def test_images_do_not_influence_each_other(self, clip: Path, name: str, codec: str) -> None:
        mixture, images = make_mixture(clip, ROUTINGS[name](), CODECS[codec]), uint8_images(3)
        batch = mixture.predict(images, TASKS[2])
        single = [mixture.predict(image[None], TASKS[2]) for image in images]
        assert_close(batch.probability, torch.cat([p.probability for p in single]), rtol=1e-4, atol=1e-6)
        assert_close(batch.weights, torch.cat([p.weights for p in single]), rtol=1e-4, atol=1e-5)
        assert torch.equal(batch.label, torch.cat([p.label for p in single]))

    def test_pictures_are_preprocessed(self, clip: Path) -> None:
        mixture = make_mixture(clip, Router())
        pictures = [draw(seed, seed % 3) for seed in range(4)]
        tensors = torch.stack([mixture.backbone.preprocess(picture) for picture in pictures])
        assert torch.equal(mixture.predict(pictures).probability, mixture.predict(tensors).probability)

    def test_names_of_classes_may_be_unknown(self, clip: Path) -> None:
        mixture = make_mixture(clip, Router())
        nameless = Mixture(mixture.vectors, mixture.backbone, mixture.heads, Router()).eval()
        assert nameless.predict(uint8_images()).class_name == [""] * 5

    def test_calling_the_module_gives_logits(self, clip: Path) -> None:
        mixture = make_mixture(clip, Router())
        logits = mixture(uint8_images(), TASKS[1])
        assert logits.shape == (5, len(CLASSES[TASKS[1]]))
        assert torch.equal(logits.argmax(-1), mixture.predict(uint8_images(), TASKS[1]).label)

    def test_no_image_is_refused(self, clip: Path) -> None:
        mixture = make_mixture(clip, Router())
        for nothing in ([], uint8_images(0)):
            with pytest.raises(InputError, match="no image was given"):
                mixture.predict(nothing)


class TestMoving:
    @pytest.mark.parametrize("name", ROUTINGS)
    def test_to_moves_everything_along(self, clip: Path, name: str) -> None:
        """The device without memory shows what stays behind, also where there is no GPU."""
        mixture = make_mixture(clip, ROUTINGS[name](), "low_rank", exclude=("visual.conv1*",))
        mixture.backbone = type(mixture.backbone)(clip / "base")  # the cached one stays where it is
        assert "visual.conv1.weight" in mixture.vectors.rest
        mixture.to("meta")
        heads = [x for head in mixture.heads.values() for x in (head.weight, head.bias) if x is not None]
        blocks = [value for block in mixture.vectors.blocks.values() for value in vars_of(block)]
        tensors = [*mixture.state_dict().values(), *mixture.shared.values(), *heads, *blocks]
        assert {tensor.device.type for tensor in [*tensors, mixture.backbone.mean]} == {"meta"}

    def test_moving_keeps_the_predictions(self, clip: Path) -> None:
        mixture = make_mixture(clip, Router())
        before = mixture.predict(uint8_images())
        assert mixture.to("cpu") is mixture
        assert torch.equal(mixture.predict(uint8_images()).probability, before.probability)


def vars_of(block: object) -> list[Tensor]:
    values = [getattr(block, name) for name in type(block).__slots__]
    return [value for value in values if isinstance(value, Tensor)]


class TestRefusals:
    def test_an_oracle_without_the_task(self, clip: Path) -> None:
        with pytest.raises(InputError, match="this routing is an oracle: it needs the true task") as caught:
            make_mixture(clip, Oracle()).predict(uint8_images())
        assert caught.value.exit_code == 2

    def test_an_oracle_of_a_task_without_expert(self, clip: Path) -> None:
        mixture = make_mixture(clip, Oracle())
        mixture.heads["stars"] = mixture.heads[TASKS[0]]
        with pytest.raises(InputError, match="there is no expert of 'stars'"):
            mixture.predict(uint8_images(), "stars")

    def test_a_task_that_is_not_there(self, clip: Path) -> None:
        with pytest.raises(InputError, match="there is no task 'circle'.\nDid you mean 'circles'"):
            make_mixture(clip, Router()).predict(uint8_images(), "circle")

    @pytest.mark.parametrize("codec", ["fp32", "magnitude", "ternary"])
    def test_routing_by_token_without_low_rank(self, clip: Path, codec: str) -> None:
        with pytest.raises(InputError, match="no tensor is routed by Subspace.\n.*needs low_rank"):
            make_mixture(clip, Subspace(), CODECS[codec])

    @pytest.mark.parametrize("routing", [Router, Oracle, Uniform, Subspace])
    def test_groups_that_fit_nothing(self, clip: Path, routing: type[Router]) -> None:
        with pytest.raises(InputError, match="no tensor is routed by .*\nLook at `groups`"):
            make_mixture(clip, routing(groups="decoder"))

    def test_block_gates_that_would_read_a_norm(self, clip: Path) -> None:
        mixture = make_mixture(clip, Router(reads="block"))
        with pytest.raises(InputError, match="ln_1.* is used before it.\nRoute tensors from a matrix on"):
            mixture.predict(uint8_images())

    def test_attention_with_tokens_before_samples(self) -> None:
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = nn.MultiheadAttention(12, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.attention(x, x, x, need_weights=False)[0].mean(0)

        module = Plain()
        state = dict(module.state_dict())
        experts = {task: {n: x + i for n, x in state.items()} for i, task in enumerate(TASKS, 1)}
        vectors = TaskVectors.open(state, experts, force=True)
        with pytest.raises(InputError, match="attention has tokens before samples.*\n.*batch_first=True"):
            Mixture(vectors, ModuleBackbone(module), heads_of(), Uniform())

    def test_a_function_that_is_not_known(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(12))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.scale.exp()

        state = dict(Odd().state_dict())
        experts = {task: {"scale": state["scale"] + i} for i, task in enumerate(TASKS, 1)}
        vectors = TaskVectors.open(state, experts, force=True)
        mixture = Mixture(vectors, ModuleBackbone(Odd()), heads_of(), Uniform())
        with pytest.raises(InputError, match="does not know torch.Tensor.exp on scale") as caught:
            mixture.predict(torch.randn(3, 12))
        assert caught.value.exit_code == 2


def test_backbones_are_shared_between_mixtures(clip: Path) -> None:
    """A pass leaves nothing behind in the architecture."""
    images, backbone = uint8_images(), backbone_of(clip)
    state = average(vectors_of(clip))
    before = backbone.features(state, images)
    make_mixture(clip, Router()).predict(images)
    assert torch.equal(backbone.features(state, images), before)
