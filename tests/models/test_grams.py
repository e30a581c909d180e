"""Gram matrices: what is seen of a forward pass, against hooks and formulas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import noise, specs
from conftest import TASKS
from small_experts import Setup, mlp, random, tokens, two_tasks
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from adamerge.checkpoints import open_checkpoint
from adamerge.errors import NumericError
from adamerge.models import OpenClipBackbone, zero_shot_heads
from adamerge.models.statistics import Statistics
from adamerge.state import State
from adamerge.static import merge
from adamerge.vectors import TaskVectors

BLOCK = "visual.transformer.resblocks.1."


def inputs_of_linears(module: nn.Module, weights: State, inputs: Tensor) -> dict[str, Tensor]:
    """Watch what every nn.Linear is called with."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        part.register_forward_pre_hook(
            lambda _module, args, name=name: seen.setdefault(f"{name}.weight", []).append(args[0])
        )
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    ]
    with torch.no_grad():
        torch.func.functional_call(module, dict(weights), (inputs,))
    for handle in handles:
        handle.remove()
    return {n: torch.cat([x.reshape(-1, x.shape[-1]) for x in rows]) for n, rows in seen.items()}


def gram(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


class Residual(nn.Module):
    """Attention with separate projections, as Hugging Face has it, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6, bias=i > 0) for i in range(3))
        self.twice = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        return self.twice(self.twice(x)).mean(0)


@pytest.mark.parametrize(
    ("module", "shape"), [(mlp, (6,)), (tokens, (3, 6)), (Residual, (4, 6))], ids=["rows", "tokens", "heads"]
)
@pytest.mark.parametrize("batch_size", [4, 32])
def test_gram_matrices_are_those_of_the_inputs_that_hooks_see(
    module: Callable[[], nn.Module], shape: tuple[int, ...], batch_size: int
) -> None:
    setup = Setup(module(), two_tasks(*shape))
    found = setup.statistics(batch_size=batch_size)["gram"]
    for index, (task, images) in enumerate(setup.images.items()):
        seen = inputs_of_linears(setup.module, setup.experts[task], images)
        assert set(seen) == set(found.order)
        for name, rows in seen.items():
            assert_close(found(name, {})[index], gram(rows))


class TestPackedAttention:
    """open_clip's attention holds one matrix for three projections, and never calls its out_proj."""

    @pytest.fixture(autouse=True)
    def _clip(self, clip: Path) -> None:
        self.backbone = OpenClipBackbone(clip / "base")
        base = dict(open_checkpoint(clip / "base"))
        self.experts = {t: base | dict(open_checkpoint(clip / "experts" / f"{t}.safetensors")) for t in TASKS}
        self.base = base
        self.images = {task: noise(8, seed).images for seed, task in enumerate(TASKS)}
        self.heads = zero_shot_heads(clip / "base", specs())

    def statistics(self, **options: Any) -> Statistics:
        return Statistics(self.backbone, self.heads, self.images, self.experts.__getitem__, **options)

    def literal(self, task: str) -> dict[str, Tensor]:
        """Compute one block's attention step by step, from what its norms give."""
        module, weights = self.backbone.module, self.experts[task]
        seen: dict[str, Tensor] = {}
        parts = {"ln_1": "attn.in_proj_weight", "ln_2": "mlp.c_fc.weight", "mlp.gelu": "mlp.c_proj.weight"}
        handles = [
            module.get_submodule(BLOCK.removeprefix("visual.") + part).register_forward_hook(
                lambda _module, _args, out, name=name: seen.__setitem__(BLOCK + name, out)
            )
            for part, name in parts.items()
        ]
        with torch.no_grad():
            self.backbone.features(weights, self.images[task])
        for handle in handles:
            handle.remove()
        x = seen[BLOCK + "attn.in_proj_weight"]
        packed = x @ weights[BLOCK + "attn.in_proj_weight"].T + weights[BLOCK + "attn.in_proj_bias"]
        q, k, v = packed.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)  # two heads of eight
        mixed = (q @ k.mT / 8**0.5).softmax(-1) @ v
        seen[BLOCK + "attn.out_proj.weight"] = mixed.transpose(1, 2).flatten(2)
        return {name: rows.reshape(-1, rows.shape[-1]) for name, rows in seen.items()}

    def test_its_gram_matrices_are_those_of_its_formula(self) -> None:
        found = self.statistics()["gram"]
        for index, task in enumerate(TASKS):
            for name, rows in self.literal(task).items():
                assert_close(found(name, {})[index], gram(rows), rtol=1e-4, atol=1e-5)

    def test_all_matrices_and_the_projection_have_one_and_nothing_else(self) -> None:
        found = self.statistics()["gram"]
        matrices = [n for n, t in self.base.items() if n in self.backbone.names and t.dim() == 2]
        assert set(found.order) == set(matrices) - {"visual.positional_embedding"}
        for name in ("visual.conv1.weight", "visual.positional_embedding", "visual.ln_post.bias", "ln"):
            assert found(name, {}) is None

    def test_behind_a_merged_block_the_next_one_reads_what_it_gives(self) -> None:
        merged = {n: t + 0.1 for n, t in self.base.items() if not n.startswith(BLOCK)}
        name = BLOCK + "attn.in_proj_weight"
        found = self.statistics()["prefix_gram"](name, merged)
        self.experts = {
            task: {n: merged.get(n, t) for n, t in state.items()} for task, state in self.experts.items()
        }
        assert_close(found, self.statistics()["gram"](name, {}))

    def test_every_method_merges_equal_experts_to_the_expert(self) -> None:
        one = self.experts[TASKS[0]]
        self.experts = dict.fromkeys(TASKS, one)
        with pytest.warns(UserWarning, match="are equal"):
            vectors = TaskVectors.open(self.base, self.experts)
        for method in ("regmean", "regmean_pp", "fisher"):
            merged = merge(vectors, method, statistics=self.statistics(samples=4))
            for name in self.backbone.names:
                assert_close(merged[name], one[name])

    def test_per_sample_gradients_are_the_same_one_by_one(self) -> None:
        batched, single = self.statistics()["fisher"], self.statistics(memory_budget=1)["fisher"]
        for name in ("visual.conv1.weight", BLOCK + "attn.in_proj_weight", "visual.class_embedding"):
            assert_close(batched(name, {}), single(name, {}), rtol=1e-4, atol=1e-7)


def test_a_layer_that_torch_computes_in_one_operation_is_seen() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    setup = Setup(nn.Sequential(layer, nn.Flatten()), two_tasks(3, 8))
    assert len(setup.statistics()["gram"].order) == 4
    assert torch.backends.mha.get_fastpath_enabled()


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.square = nn.Parameter(random(6, 3)), nn.Parameter(random(3, 3, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.wide @ self.square


def test_matrices_stored_transposed_count_unless_they_are_square() -> None:
    setup = Setup(Transposed(), two_tasks(6))
    found = setup.statistics()["gram"]
    assert found.order == ("wide",)
    assert_close(found("wide", {})[0], gram(setup.images["a"]))


class Closing(nn.Module):
    """Must not be reached once it is closed."""

    is_closed = False

    def forward(self, x: Tensor) -> Tensor:
        assert not self.is_closed
        return x


class TestRegMeanPP:
    def test_three_layers_by_hand(self) -> None:
        """Stream each task's inputs through the layers merged so far; solve; go on."""
        setup = Setup(mlp(), two_tasks(6, count=40))
        streams, expected = dict(setup.images), {}
        for layer in ("0", "2", "4"):
            grams = {task: gram(x).double() for task, x in streams.items()}
            target = sum(g @ setup.experts[t][f"{layer}.weight"].T.double() for t, g in grams.items())
            weight = torch.linalg.solve(sum(grams.values()), target).T.float()
            bias = torch.zeros(())
            if layer != "2":
                bias = sum(expert[f"{layer}.bias"] for expert in setup.experts.values()) / 2
                expected[f"{layer}.bias"] = bias
            expected[f"{layer}.weight"] = weight
            streams = {task: torch.tanh(x @ weight.T + bias) for task, x in streams.items()}
        found = merge(setup.vectors(), "regmean_pp", statistics=setup.statistics(), shrink=1.0)
        for name, tensor in expected.items():
            assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)

    def test_the_order_is_the_forward_passes(self) -> None:
        setup = Setup(mlp(), two_tasks(6))
        weights = ("0.weight", "2.weight", "4.weight")
        assert tuple(n for n in setup.statistics()["prefix_gram"].order if n in weights) == weights

    def test_a_small_budget_only_takes_more_passes(self) -> None:
        setup = Setup(nn.Sequential(nn.Sequential(*mlp())), two_tasks(6))
        assert all(name.startswith("0.") for name in setup.base)
        rich, poor = (setup.statistics(memory_budget=m)["prefix_gram"] for m in (10**6, 1))
        for name in rich.order:
            if name.endswith("weight"):
                assert_close(poor(name, {}), rich(name, {}))

    def test_another_merge_starts_anew(self) -> None:
        setup = Setup(mlp(), two_tasks(6))
        found = setup.statistics()["prefix_gram"]
        before = found("2.weight", {})
        after = found("2.weight", {"0.weight": 0 * setup.base["0.weight"]})
        assert not torch.allclose(before, after)

    def test_a_pass_ends_behind_the_block(self) -> None:
        setup = Setup(nn.Sequential(nn.Linear(6, 5), Closing()), two_tasks(6))
        found = setup.statistics()["prefix_gram"]
        assert found.order
        Closing.is_closed = True
        assert found("0.weight", {}) is not None

    def test_infinite_inputs_are_refused(self) -> None:
        setup = Setup(mlp(), two_tasks(6))
        setup.experts["b"]["2.weight"].fill_(torch.nan)
        with pytest.raises(NumericError, match="inputs of 4.weight are not finite"):
            setup.statistics()["gram"]("4.weight", {})
