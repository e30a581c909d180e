"""Class names of a task against those of its source."""

import pytest

from adamerge.data.labels import difference_of_order


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["tricycle", "road bike"], ["road bike", "tricycle"]),
        (["tricycle", "Road  bike"], ["road_bike", "TRICYCLE "]),
        (["tricycle", "road-bike"], ["0_road_bike", "1_tricycle"]),
        (["1_tricycle", "0_road bike"], ["0_road bike", "1_tricycle"]),
        (["tricycle", "road bike"], ["001.Road bike", "012. Tricycle"]),
        (["2", "10"], ["10", "2"]),  # numbers as names are names
    ],
)
def test_the_same_names_in_another_order_are_told(classes: list[str], names: list[str]) -> None:
    told = f"classes are [{', '.join(classes)}], the images have, in order, [{', '.join(names)}]"
    assert difference_of_order(classes, names) == told


def test_long_lists_are_told_from_where_they_differ() -> None:
    names = [*"abcdefghij"]
    told = "from index 2 on classes are [d, c, e, f, g and 3 more], the images have, in order, [c, d, e, f, g"
    assert (difference_of_order([*"abdcefghij"], names) or "").startswith(told)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["road bike", "tricycle"], ["0_Road-Bike", "1_tricycle"]),
        (["tricycle", "bike"], ["n02835271", "n04482393"]),
        (["tricycle", "bike"], ["bike", "tricycle", "unicycle"]),
        (["tricycle", "2 wheels"], ["wheels", "tricycle"]),  # a number before one name is part of it
        (["a", "a", "b"], ["b", "a", "b"]),
        (["a", "b"], []),
    ],
)
def test_nothing_is_told_of_equal_lists_and_of_other_names(classes: list[str], names: list[str]) -> None:
    assert difference_of_order(classes, names) is None
