"""The second view of images."""

import pytest
import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.objectives import Balanced, Consistency, Entropy, Mixed


def images(n_images: int = 12, height: int = 10, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n_images, 3, height, width), generator=generator, dtype=torch.uint8)


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """Move what is seen, pixel by pixel, and repeat the border."""
    _, height, width = image.shape
    found = torch.empty_like(image)
    for y in range(height):
        for x in range(width):
            found[:, y, x] = image[:, min(max(y + down, 0), height - 1), min(max(x + right, 0), width - 1)]
    return found


def test_every_image_moves_by_its_own_few_pixels() -> None:
    given = images()
    found, offsets = Consistency(shift=0.2).second_view(given, "cars", 3), []
    for image, moved in zip(given, found, strict=True):
        places = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
        offsets += [place for place in places if torch.equal(shifted(image, *place), moved)]
    assert len(offsets) == len(given)
    assert len(set(offsets)) > 6
    assert found.shape == given.shape
    assert found.dtype == torch.uint8


def test_half_of_the_images_are_mirrored_where_that_is_asked_for() -> None:
    given = images(100)
    found = Consistency(shift=0.0, flip=True).second_view(given, "cars", 0)
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(given, found, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(given, found, strict=True)]
    assert sum(mirrored) + sum(kept) == 100
    assert 30 < sum(mirrored) < 70
    assert torch.equal(Consistency(shift=0.0).second_view(given, "cars", 0), given)


def test_a_view_is_a_function_of_task_and_step() -> None:
    objective = Consistency(shift=0.4, flip=True)
    first = objective.second_view(images(), "cars", 1)
    assert torch.equal(objective.second_view(images(), "cars", 1), first)
    assert not torch.equal(objective.second_view(images(), "cars", 2), first)
    assert not torch.equal(objective.second_view(images(), "digits", 1), first)


def test_the_clean_view_counts_as_fixed() -> None:
    clean, moved = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    Consistency()(moved, "cars", clean).backward()
    assert clean.grad is None
    assert moved.grad is not None


def test_a_sum_augments_where_a_part_does() -> None:
    part = Consistency(shift=0.3)
    mixed = Mixed([Entropy(), part])
    assert mixed.augments
    assert not Mixed([Entropy(), Balanced()]).augments
    assert torch.equal(mixed.second_view(images(), "cars", 1), part.second_view(images(), "cars", 1))
    with pytest.raises(InputError, match="two parts of Mixed augment the images"):
        Mixed([Consistency(), Consistency()])


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(InputError, match="task 'cars' has torch.int64 inputs"):
        Consistency().second_view(torch.zeros(2, 3, 5, dtype=torch.int64), "cars", 0)
    with pytest.raises(InputError, match="needs both views of task 'cars'"):
        Consistency()(torch.zeros(2, 3), "cars")


@pytest.mark.parametrize("options", [{"shift": -0.1}, {"shift": 0.6}, {"temperature": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}=.* is out of range"):
        Consistency(**options)
