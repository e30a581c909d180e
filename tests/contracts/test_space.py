"""The contract of coefficient spaces: a new one tells how it is made and what it merges to at its start."""

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge import Components, Concrete, Elements, InputError, TaskVectors
from adamerge.spaces import Space

TASKS = ("cars", "digits", "textures")
SHAPES = {"block.0.weight": (6, 4), "block.0.bias": (6,), "conv.weight": (4, 2, 3, 3), "norm": (4,)}


@cache
def vectors() -> TaskVectors:
    generator = torch.Generator().manual_seed(0)
    base, *experts = (
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(4)
    )
    return TaskVectors.open(base, dict(zip(TASKS, experts, strict=True)), force=True)


class SpaceContract:
    def make(self) -> Space:
        raise NotImplementedError

    def start(self) -> dict[str, Tensor]:
        """Give the merged tensors before training."""
        return vectors().merge(vectors().uniform(0.3))

    def built(self) -> Space:
        space = self.make()
        space.build(TASKS, vectors())
        return space

    def trained(self) -> Space:
        space = self.built()
        optimizer = torch.optim.Adam(space.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            sum(((w - 1) ** 2).sum() for w in space(vectors()).values()).backward()
            optimizer.step()
            space.after_step()
        return space

    def test_it_starts_where_it_should(self) -> None:
        merged = self.built()(vectors())
        assert list(merged) == list(self.start())
        assert_close(merged, self.start())

    def test_a_part_of_the_tensors_can_be_merged_alone(self) -> None:
        space = self.built()
        part = space(vectors(), {"block.0.weight", "norm"})
        whole = space(vectors())
        assert set(part) == {"block.0.weight", "norm"}
        assert all(torch.equal(part[name], whole[name]) for name in part)

    def test_every_refined_tensor_and_every_number_in_use_gets_a_gradient(self) -> None:
        space = self.built()
        sum(w.square().sum() for w in space(vectors()).values()).backward()
        assert space.fine.names
        for name, parameter in space.fine.items():
            assert parameter.dtype == torch.float32
            assert parameter.grad.abs().sum() > 0, name
        for i, name in enumerate(vectors().names):
            assert name in space.fine or space.matrix.values.grad[:, i].abs().sum() > 0

    def test_training_moves_the_merged_tensors_and_reset_goes_back(self) -> None:
        space = self.trained()
        moved = space(vectors())
        assert all((moved[name] - tensor).abs().max() > 1e-3 for name, tensor in self.start().items())
        space.reset()
        assert_close(space(vectors()), self.start())

    def test_its_state_gives_the_same_merge_again(self) -> None:
        space, again = self.trained(), self.built()
        again.load_state_dict(space.state_dict())
        theirs = again(vectors())
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in space(vectors()).items())

    def test_the_table_has_a_finite_number_per_task_and_tensor(self) -> None:
        groups, values = self.trained().table()
        assert groups == list(vectors().names)
        assert values.shape == (len(TASKS), len(groups))
        assert values.isfinite().all()


class TestWeightsOfComponents(SpaceContract):
    def make(self) -> Space:
        return Components("weight")


class TestMasksOfComponents(SpaceContract):
    def make(self) -> Space:
        return Components("mask")


class TestTheLargestComponents(SpaceContract):
    def make(self) -> Space:
        return Components("mask", keep=0.5, rank=0.75)

    def start(self) -> dict[str, Tensor]:
        merged = super().start()
        for name in ("block.0.weight", "conv.weight"):
            block = vectors().blocks[name]
            left, values, right = torch.linalg.svd(block.dense().flatten(2), full_matrices=False)
            kept = round(0.5 * round(0.75 * values.shape[1]))
            low = (left * values[:, None])[..., :kept] @ right[:, :kept]
            merged[name] = block.base_tensor() + 0.3 * low.sum(0).reshape(block.shape[1:])
        return merged


class TestElements(SpaceContract):
    def make(self) -> Space:
        return Elements()


class TestRows(SpaceContract):
    def make(self) -> Space:
        return Elements("row")


class TestElementsOfSomeTensors(SpaceContract):
    def make(self) -> Space:
        return Elements(pattern="weight")


class TestConcrete(SpaceContract):
    def make(self) -> Space:
        return Concrete().eval()  # in training the masks have noise


class TestDualConcrete(SpaceContract):
    def make(self) -> Space:
        return Concrete(dual=True).eval()


class TestFixedConcrete(TestConcrete):
    """Under a fixed sample of the masks the numbers alone are learned."""

    def make(self) -> Space:
        return Concrete(fix_after=0)

    def start(self) -> dict[str, Tensor]:
        space = self.built()
        merged = super().start()
        for name, block in vectors().blocks.items():
            merged[name] = block.base_tensor() + space.mask(name) * 0.3 * block.dense().sum(0)
        return merged

    def test_every_refined_tensor_and_every_number_in_use_gets_a_gradient(self) -> None:
        space = self.built()
        sum(w.square().sum() for w in space(vectors()).values()).backward()
        assert (space.matrix.values.grad.abs() > 0).all()
        assert all(parameter.grad is None for _, parameter in space.fine.items())


def test_a_mask_is_binary_and_its_gradient_that_of_a_soft_step() -> None:
    space = Components("mask", initial=1.0)
    space.build(TASKS, vectors())
    name = "block.0.weight"
    with torch.no_grad():
        space.fine[name][0, 1] = -1e-3
    block = vectors().blocks[name]
    left, values, right = torch.linalg.svd(block.dense(), full_matrices=False)
    merged = space(vectors())[name]
    dropped = values[0, 1] * torch.outer(left[0, :, 1], right[0, 1])
    assert_close(merged, block.base_tensor() + block.dense().sum(0) - dropped)
    gradient = torch.ones_like(merged)
    merged.backward(gradient)
    soft = torch.sigmoid(space.fine[name][0, 1] / 10)
    slope = (gradient * dropped).sum() * soft * (1 - soft) / 10
    assert_close(space.fine[name].grad[0, 1], slope)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"pattern": "("}, "no regular expression"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        Components(**options)


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no tensor that pattern 'norm'"):
        Components(pattern="norm").build(TASKS, vectors())
