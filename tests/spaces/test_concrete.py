"""Relaxed masks: their noise, their mean, their last sample."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import Concrete, InputError, TaskVectors
from adamerge.vectors import LowRankCodec

NAME = "block.0.weight"


def vectors(codec: object = "fp32") -> TaskVectors:
    generator = torch.Generator().manual_seed(0)
    shapes = {NAME: (16, 40), "block.0.bias": (16,), "scale": (1,)}
    base, *experts = ({n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(3))
    return TaskVectors.open(base, {"cars": experts[0], "digits": experts[1]}, codec, force=True)


def built(**options: object) -> Concrete:
    space = Concrete(**options)
    space.build(("cars", "digits"), vectors())
    return space


def literal(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    mask = 1 / (1 + torch.exp(-(logits + noise) / temperature))
    return mask / (mask.sum() / mask.numel())


def test_in_evaluation_a_mask_is_its_sigmoid_over_its_mean() -> None:
    space = built(temperature=0.7).eval()
    logits = torch.randn(16, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        space.fine[NAME].copy_(logits)
    assert_close(space.mask(NAME), literal(logits, torch.zeros(()), 0.7))
    block = vectors().blocks[NAME]
    expected = block.base_tensor() + space.mask(NAME) * 0.3 * block.dense().sum(0)
    assert_close(space(vectors())[NAME], expected)


@pytest.mark.parametrize("dual", [False, True])
def test_in_training_a_mask_is_drawn_by_seed_step_and_tensor(dual: bool) -> None:
    space, again, other = built(dual=dual), built(dual=dual), built(dual=dual, seed=1)
    first = space.mask(NAME)
    assert torch.equal(first, space.mask(NAME))  # a second pass of the same step
    assert_close(first.mean((-2, -1)), torch.ones(2) if dual else torch.tensor(1.0))
    assert 0 < first.min() < 0.1  # at temperature 0.5 many entries are almost out
    space.after_step()
    assert not torch.equal(space.mask(NAME), first)
    assert not torch.equal(other.mask(NAME), first)
    again.load_state_dict(space.state_dict())  # a resumed run
    assert torch.equal(again.mask(NAME), space.mask(NAME))


def test_noise_is_logistic() -> None:
    noise = built()._noise(NAME, torch.zeros(200, 200))
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 3, rel=0.05)


def test_the_last_sample_stays_and_is_what_is_evaluated() -> None:
    space = built(fix_after=2)
    masks = []
    for _ in range(4):
        masks.append(space.mask(NAME).detach())
        space.after_step()
    assert torch.equal(masks[2], masks[3])
    assert len({float(mask[0, 0]) for mask in masks}) == 3
    assert torch.equal(space.eval().mask(NAME), masks[3])
    space.reset()
    assert torch.equal(space.mask(NAME), torch.ones(16, 40))


def test_compressed_vectors_are_masked_after_they_are_summed() -> None:
    stored = vectors(LowRankCodec(0.5))
    space = built().eval()
    with torch.no_grad():
        space.fine[NAME].normal_(generator=torch.Generator().manual_seed(2))
    block = stored.blocks[NAME]
    expected = block.base_tensor() + space.mask(NAME) * 0.3 * block.dense().sum(0)
    assert_close(space(stored)[NAME], expected)


def test_numbers_can_stay_and_single_entries_have_no_mask() -> None:
    space = built(learn_numbers=False)
    sum(w.sum() for w in space(vectors()).values()).backward()
    assert space.matrix.values.grad is None
    assert space.fine.names == [NAME[:-6] + "bias", NAME]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"fix_after": -1}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}=.* is out of range"):
        Concrete(**options)
