"""Images of a task: parts of them, and samples."""

import torch

from adamerge.data.datasets import Images


def images(count: int) -> Images:
    return Images(torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1))


def test_a_sample_is_drawn_from_all_over_and_keeps_the_order() -> None:
    """Folders are sorted by class: their first images would all be of one."""
    found = images(200).sample(40).images[:, 0, 0, 0].tolist()
    assert found == sorted(set(found))
    assert len(found) == 40
    assert all(any(low <= image < low + 50 for image in found) for low in range(0, 200, 50))
    assert found == images(200).sample(40).images[:, 0, 0, 0].tolist()


def test_a_sample_of_more_than_there_are_is_all() -> None:
    assert torch.equal(images(7).sample(64).images, images(7).images)
