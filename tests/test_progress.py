"""What a terminal shows."""

import pytest

from adamerge.progress import duration, new_bar, stop_bars, track


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (185.0, "3 min 5 s"), (7800.0, "2 h 10 min"), (99.94, "99.9 s")]
)
def test_durations_are_written_as_people_write_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bars_under_way_can_be_ended_from_outside() -> None:
    bar = new_bar()
    bar.start()
    stop_bars()
    assert not bar.live.is_started


def test_tracked_items_come_through() -> None:
    assert list(track([3, 1], "counting")) == [3, 1]
