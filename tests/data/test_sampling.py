"""Batches are a pure function of seed, task and step."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamerge.data.sampling import StepSampler


def sampler(n_images: int = 10, batch_size: int = 4, first_step: int = 0, **key: object) -> StepSampler:
    return StepSampler(n_images, batch_size, **({"seed": 0, "task": "cars"} | key), first_step=first_step)


@given(step=st.integers(0, 200), n_images=st.integers(1, 9), batch_size=st.integers(1, 20))
def test_starting_late_gives_what_would_have_come(step: int, n_images: int, batch_size: int) -> None:
    late = sampler(n_images, batch_size, first_step=step)
    assert next(iter(late)) == sampler(n_images, batch_size).batch(step)


def test_every_epoch_sees_every_image_once_in_a_new_order() -> None:
    stream = [i for batch in islice(sampler(10, 4), 5) for i in batch]  # batches span epochs
    first, second = stream[:10], stream[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_a_data_set_smaller_than_a_batch_is_walked_more_than_once() -> None:
    assert Counter(sampler(3, 7).batch(0)).most_common()[-1][1] == 2


def test_images_in_their_given_order_come_again_and_again() -> None:
    assert [i for batch in islice(sampler(5, 3, shuffle=False), 4) for i in batch] == [
        *range(5),
        *range(5),
        0,
        1,
    ]
    assert sampler(5, 3, shuffle=False).batch(1) == [3, 4, 0]


@pytest.mark.parametrize("key", [{"seed": 1}, {"task": "digits"}])
def test_seeds_and_tasks_have_orders_of_their_own(key: dict[str, object]) -> None:
    assert sampler(100, 50, **key).batch(0) != sampler(100, 50).batch(0)


def test_the_order_is_the_same_on_every_machine() -> None:
    assert sampler().batch(0) == [6, 4, 9, 0]
