"""The contracts of coefficients: a new static kind gives two methods, one per input (`Routing`) one."""

import json

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.coefficients import GROUPINGS, Coefficients, Learned, Oracle, Router, Routing, Subspace, Uniform

TASKS = ("cars", "digits", "textures")
NAMES = (
    "ln_post.weight",
    "transformer.resblocks.0.attn.in_proj_bias",
    "transformer.resblocks.0.attn.in_proj_weight",
    "transformer.resblocks.0.ln_1.weight",
    "transformer.resblocks.1.mlp.c_fc.bias",
    "transformer.resblocks.1.mlp.c_fc.weight",
)


class CoefficientsContract:
    def make(self) -> Coefficients:
        raise NotImplementedError

    def start(self) -> Tensor:
        """Give the coefficients before training, `[task, tensor]`."""
        raise NotImplementedError

    def built(self) -> Coefficients:
        coefficients = self.make()
        coefficients.build(TASKS, NAMES)
        return coefficients

    def trained(self, steps: int = 3) -> Coefficients:
        coefficients = self.built()
        optimizer = torch.optim.Adam(coefficients.parameters(), lr=0.4)
        target = torch.linspace(-1, 2, len(TASKS) * len(NAMES)).reshape(len(TASKS), -1)
        for _ in range(steps):
            optimizer.zero_grad()
            (coefficients() - target).square().sum().backward()
            optimizer.step()
            coefficients.after_step()
        return coefficients

    def test_it_starts_where_it_should(self) -> None:
        matrix = self.built()()
        assert matrix.dtype == torch.float32
        assert_close(matrix.detach(), self.start())

    def test_every_parameter_is_fp32_and_gets_a_gradient(self) -> None:
        coefficients = self.built()
        coefficients().sum().backward()
        for parameter in coefficients.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.grad.abs().sum() > 0

    def test_training_changes_it_and_reset_goes_back_in_place(self) -> None:
        coefficients = self.trained()
        parameters = [id(p) for p in coefficients.parameters()]
        assert not torch.equal(coefficients(), self.start())
        coefficients.reset()
        assert_close(coefficients().detach(), self.start())
        assert [id(p) for p in coefficients.parameters()] == parameters

    def test_its_state_dict_restores_it_bit_for_bit(self) -> None:
        trained, fresh = self.trained(), self.built()
        fresh.load_state_dict(trained.state_dict())
        assert torch.equal(fresh(), trained())

    def test_its_table_names_groups_and_holds_the_effective_values(self) -> None:
        coefficients = self.trained()
        groups, values = coefficients.table()
        assert len(set(groups)) == len(groups) == values.shape[1]
        assert len(values) == len(TASKS)
        assert not values.requires_grad
        effective = {round(x, 5) for x in coefficients().detach().flatten().tolist()}
        assert {round(x, 5) for x in values.flatten().tolist()} == effective


@pytest.mark.parametrize("clamp", ["off", "on", "projected"])
@pytest.mark.parametrize("grouping", GROUPINGS)
class TestLearned(CoefficientsContract):
    @pytest.fixture(autouse=True)
    def _options(self, grouping: str, clamp: str) -> None:
        self.grouping, self.clamp = grouping, clamp

    def make(self) -> Learned:
        return Learned(self.grouping, [0.2, 0.3, 0.7], self.clamp)

    def start(self) -> Tensor:
        return torch.tensor([0.2, 0.3, 0.7])[:, None].expand(-1, len(NAMES))

    def test_clamping_keeps_the_coefficients_in_the_unit_interval(self) -> None:
        matrix = self.trained(steps=8)()
        outside = bool(((matrix < 0) | (matrix > 1)).any())
        assert outside == (self.clamp == "off")


class RoutingContract:
    def make(self) -> Routing:
        raise NotImplementedError

    def features(self, count: int = 12, dim: int = 6) -> Tensor:
        return torch.randn(count, dim, generator=torch.Generator().manual_seed(count))

    def built(self, dim: int = 6) -> Routing:
        routing = self.make()
        groups = {routing.group_of(name) for name in NAMES} - {None}
        self.groups = sorted(groups)
        routing.build(TASKS, dict.fromkeys(self.groups, dim))
        return routing

    def weights(self, routing: Routing, features: Tensor | None = None) -> Tensor:
        features = self.features() if features is None else features
        return torch.stack([routing(features, group) for group in self.groups])

    def trained(self) -> Routing:
        routing = self.built()
        optimizer = torch.optim.Adam(routing.parameters(), lr=0.1)
        target = torch.tensor([-1.0, 2.0, 0.5])
        for _ in range(3):
            optimizer.zero_grad()
            (self.weights(routing) - target).square().sum().backward()
            optimizer.step()
            routing.after_step()
        return routing

    def test_each_sample_has_a_weight_per_task_in_fp32(self) -> None:
        weights = self.weights(self.built())
        assert weights.shape == (len(self.groups), 12, len(TASKS))
        assert weights.dtype == torch.float32
        assert torch.isfinite(weights).all()

    def test_a_sample_is_routed_the_same_alone_and_among_others(self) -> None:
        routing = self.built().eval()
        together = self.weights(routing)
        alone = [self.weights(routing, row[None]) for row in self.features()]
        assert_close(together, torch.cat(alone, dim=1))

    def test_its_options_make_it_again(self) -> None:
        routing = self.make()
        options = json.loads(json.dumps(routing.options()))
        assert type(routing)(**options).options() == options

    def test_its_table_has_a_column_per_label(self) -> None:
        groups, values = self.built().table()
        assert len(set(groups)) == len(groups) == values.shape[1]
        assert len(values) == len(TASKS)
        assert not values.requires_grad

    def test_its_state_dict_restores_it_bit_for_bit(self) -> None:
        routing, fresh = self.built(), self.built()
        self.weights(routing)  # statistics and counters move
        fresh.load_state_dict(routing.state_dict())
        assert torch.equal(self.weights(fresh), self.weights(routing))


class TrainedRoutingContract(RoutingContract):
    def test_every_parameter_is_fp32_and_gets_a_gradient(self) -> None:
        routing = self.built()
        (self.weights(routing)[..., 0] - 2).square().sum().backward()
        assert list(routing.parameters())
        for parameter in routing.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.grad.abs().sum() > 0

    def test_training_changes_it_and_reset_goes_back_bit_for_bit_in_place(self) -> None:
        routing, start = self.trained(), self.built().state_dict()
        parameters = [id(p) for p in routing.parameters()]
        assert not all(torch.equal(value, start[name]) for name, value in routing.state_dict().items())
        routing.reset()
        assert all(torch.equal(value, start[name]) for name, value in routing.state_dict().items())
        assert [id(p) for p in routing.parameters()] == parameters

    def test_it_can_be_built_again_for_other_features(self) -> None:
        routing = self.built()
        routing.build(TASKS, dict.fromkeys(self.groups, 4))
        assert self.weights(routing, self.features(dim=4)).shape[-1] == len(TASKS)


@pytest.mark.parametrize(
    "select", [{"select": "softmax"}, {"select": "top_1"}, {"select": "top_k", "k": 2},
               {"select": "top_p", "p": 0.4, "renormalize": False}, {"select": "none"}]
)  # fmt: skip
@pytest.mark.parametrize("reads", ["input", "block"])
@pytest.mark.parametrize("network", ["linear", "paper", "mlp", "bias"])
class TestRouter(TrainedRoutingContract):
    @pytest.fixture(autouse=True)
    def _options(self, network: str, reads: str, select: dict[str, object]) -> None:
        self.options = {"network": network, "reads": reads} | select

    def make(self) -> Router:
        return Router(**self.options)


class TestSharedRouter(TrainedRoutingContract):
    def make(self) -> Router:
        return Router("mlp", "block", select="none", initial=0.3, groups="attn|mlp", shared=True)


class TestUniform(RoutingContract):
    def make(self) -> Uniform:
        return Uniform()


class TestOracle(RoutingContract):
    def make(self) -> Oracle:
        return Oracle()

    def features(self, count: int = 12) -> Tensor:
        return torch.arange(count) % len(TASKS)


class TestSubspace(RoutingContract):
    def make(self) -> Subspace:
        return Subspace(top_k=2)

    def features(self, count: int = 12) -> Tensor:
        return super().features(count, len(TASKS)).abs()
