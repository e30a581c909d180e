"""The contract of coefficients. A new kind subclasses `CoefficientsContract` and gives two methods."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.coefficients import GROUPINGS, Coefficients, Learned

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
