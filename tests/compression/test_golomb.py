"""The coder of ternary vectors loses nothing and stays near the information bound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamerge.compression import golomb, information_bound


def random_signs(size: int, share: float, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    signs = generator.choice(np.array([-1, 1], np.int8), size)
    return signs * (generator.random(size) < share)


def decoded(code: bytes, size: int) -> np.ndarray:
    return golomb.decode(np.frombuffer(code, np.uint8), size)


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(0, 300),
    share=st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0]),
    segment=st.integers(1, 400),
    seed=st.integers(0, 999),
)
def test_what_is_decoded_is_what_was_encoded(size: int, share: float, segment: int, seed: int) -> None:
    signs = random_signs(size, share, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(golomb, "_SEGMENT", segment)
        assert np.array_equal(decoded(golomb.encode(signs), size), signs)


@pytest.mark.parametrize("positions", [[], [0], [2**21 + 4], [0, 2**20 - 1, 2**20, 2**21 + 4], range(900)])
def test_huge_gaps_and_runs_at_segment_borders(positions: list[int]) -> None:
    signs = np.zeros(2**21 + 5, np.int8)
    signs[list(positions)] = -1
    code = golomb.encode(signs)
    assert np.array_equal(decoded(code, len(signs)), signs)
    assert len(code) < 3 * 32 + 8 * len(positions)


def test_the_format_of_version_1() -> None:
    """Gaps of 3 and 13 at exponent 3: remainders 011 and 101, lowest bits first; quotients 0 and 1."""
    signs = np.zeros(20, np.int8)
    signs[[3, 17]] = 1, -1
    head = bytes([2, 0, 0, 0, 3, 0, 0, 0, 3])  # kept entries, unary bits, exponent
    planes = [0b10, 0b11, 0b10, 0b01]  # positive, bits 0 to 2
    assert golomb.encode(signs) == head + bytes([plane << 6 for plane in planes] + [0b101 << 5])


@pytest.mark.parametrize(("share", "bits"), [(0.05, 0.3365), (0.1, 0.5694), (0.2, 0.9219), (0.5, 1.5)])
def test_random_vectors_cost_at_most_two_percent_more_than_the_bound(share: float, bits: float) -> None:
    signs = random_signs(2**19, share)
    kept = int(np.count_nonzero(signs))
    bound = information_bound(len(signs), kept)
    assert bound / len(signs) == pytest.approx(bits, rel=0.01)
    assert bound < 8 * len(golomb.encode(signs)) < 1.02 * bound


@pytest.mark.parametrize(("kept", "bound"), [(0, 16), (100, 116), (50, 16 + 150)])
def test_the_information_bound_at_its_ends(kept: int, bound: float) -> None:
    assert information_bound(100, kept) == pytest.approx(bound)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9])
def test_no_other_exponent_is_better_for_geometric_gaps(share: float) -> None:
    def bits_of_a_gap(exponent: int) -> float:
        return exponent + 1 / (1 - (1 - share) ** 2**exponent)

    assert golomb.golomb_exponent(share) == min(range(20), key=bits_of_a_gap)


def test_code_of_another_length_is_refused() -> None:
    code = golomb.encode(random_signs(500, 0.2))
    for wrong in (*(code[:n] for n in range(len(code))), code + b"\0"):
        with pytest.raises(ValueError, match="bytes are|contradict"):
            decoded(wrong, 500)
