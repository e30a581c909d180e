"""Class names of a task against those of its source."""

from typing import Any

import pytest
import torch

from adamerge.data.datasets import Images, Origin
from adamerge.data.labels import HeadClasses, difference_of_order, match_labels, match_names
from adamerge.errors import DataError


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
    told = f"classes are [{', '.join(classes)}], the data have, in order, [{', '.join(names)}]"
    assert difference_of_order(classes, names) == told


def test_long_lists_are_told_from_where_they_differ() -> None:
    names = [*"abcdefghij"]
    told = "from index 2 on classes are [d, c, e, f, g and 3 more], the data have, in order, [c, d, e, f, g"
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


def images(labels: list[int], names: tuple[str, ...] = (), *, words: bool = False) -> Images:
    blank = torch.zeros(len(labels), 1, 1, dtype=torch.int64)
    return Images(blank, torch.tensor(labels), names, origin=Origin("x.parquet", (1,), words))


def matched(
    labels: list[int],
    names: tuple[str, ...] = (),
    classes: tuple[str, ...] = (),
    rows: tuple[str, ...] = (),
    *,
    count: int | None = None,
    words: bool = False,
) -> list[int]:
    head = HeadClasses(len(rows) or count, rows)
    return match_labels("x", images(labels, names, words=words), classes, head).labels.tolist()


NUMBERS = tuple(sorted(map(str, range(12))))  # as folders are sorted: 0, 1, 10, 11, 2, ...
IN_ORDER = tuple(map(str, range(12)))


class TestMatching:
    @pytest.mark.parametrize(
        ("names", "targets", "expected"),
        [
            (["a", "b"], ["b", "a"], {0: 1, 1: 0}),
            (["Sea_Lion", "eel"], ["eel", "sea lion"], {0: 1, 1: 0}),
            (["cat", "Cat", "dog"], ["Cat", "dog", "cat"], {0: 2, 1: 0, 2: 1}),
            (["cat", "CAT"], ["Cat", "dog"], {}),  # both could be meant
            (["0_dog", "1_cat"], ["cat", "dog"], {0: 1, 1: 0}),
            (["crane", "crane", "owl"], ["crane", "crane", "owl"], {0: 0, 1: 1, 2: 2}),
            (["crane", "owl"], ["crane", "crane", "owl"], {1: 2}),
            (["STRASSE"], ["straße"], {0: 0}),
            ([], ["a"], {}),
        ],
    )
    def test_names_match_exactly_first_then_folded_then_without_numbers(
        self, names: list[str], targets: list[str], expected: dict[int, int]
    ) -> None:
        assert match_names(names, targets) == expected

    def test_labels_become_rows_of_a_head_that_names_them(self) -> None:
        assert matched([0, 1, 2], ("a", "b", "c"), rows=("c", "a", "b")) == [1, 2, 0]
        assert matched([0, 1, 2, 11], NUMBERS, rows=IN_ORDER) == [0, 1, 10, 9]

    def test_classes_say_what_numbers_mean(self) -> None:
        assert matched([0, 1, 2], classes=("a", "b", "c"), rows=("c", "a", "b")) == [1, 2, 0]
        assert matched([0, 1, 2], classes=("a", "b", "c"), rows=("x", "y", "z")) == [0, 1, 2]

    def test_classes_name_the_rows_of_a_file_that_does_not(self) -> None:
        head, given = HeadClasses(3, by_classes=True), images([0, 1, 2], ("a", "b", "c"))
        assert match_labels("x", given, ("c", "a", "b"), head).labels.tolist() == [1, 2, 0]
        with pytest.raises(DataError, match="the data have, in order"):
            match_labels("x", given, ("c", "a", "b"), HeadClasses(3))  # a zero-shot head

    def test_data_may_have_the_heads_own_names_beside_other_classes(self) -> None:
        names, rows = ("a", "b", "c"), ("c", "a", "b")
        assert matched([0, 1, 2], names, classes=("drei", "eins", "zwei"), rows=rows) == [1, 2, 0]
        assert matched([1, 0], ("a", "b"), classes=("x", "y", "z"), rows=rows, words=True) == [2, 1]

    def test_words_may_be_some_of_the_classes(self) -> None:
        assert matched([1, 0], ("b", "c"), rows=("c", "a", "b"), words=True) == [0, 2]
        assert matched([1, 0], ("b", "c"), classes=("c", "a", "b"), words=True) == [0, 2]

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"labels": [0, 3], "count": 3}, r"label 3, there are 3 class names \(row 2 of x.parquet\)"),
            ({"labels": [0, -1], "count": 3}, "label -1"),
            ({"labels": [0, 2], "classes": ("a", "b")}, "label 2, there are 2 class names"),
            ({"names": ("a", "b"), "count": 3}, r"3 rows, its test images have 2 classes \(a, b\)"),
            ({"names": ("a", "b"), "rows": ("a", "b", "c")}, "3 class names, its test images have 2"),
            ({"names": ("a", "d", "c"), "rows": ("c", "a", "b")}, r"head's classes are \[c, a, b\]"),
            (
                {"names": ("a", "b"), "classes": ("b", "a")},
                r"classes are \[b, a\], the data have, in order",
            ),
            (
                {"names": ("a", "b", "x"), "classes": ("y", "a", "b")},
                "stand in another order: 'a' is 1 here, 0",
            ),
            ({"names": NUMBERS, "count": 12}, "numbers in the order of words: 0, 1, 10, 11, 2 and 7 more"),
            ({"names": NUMBERS, "classes": tuple("abcdefghijkl")}, "numbers in the order of words"),
            ({"names": NUMBERS, "classes": IN_ORDER}, "from index 2 on classes are"),
            (
                {"classes": ("a", "b"), "rows": ("a", "b", "c")},
                r"2 class names, its head has 3 rows \(a, b, c\)",
            ),
            (
                {"classes": ("a", "c", "d"), "rows": ("a", "b", "c")},
                "class 1 is 'c', which its head calls row 2",
            ),
            ({"names": ("a",), "words": True, "count": 2}, "are words .a., and nothing says"),
            (
                {"labels": [1, 0], "names": ("a", "z"), "words": True, "rows": ("a", "b")},
                "row 0 of x.parquet has the label 'z', which is no class",
            ),
        ],
    )
    def test_what_does_not_match_is_refused(self, options: dict[str, Any], problem: str) -> None:
        with pytest.raises(DataError, match=f"task 'x'.*{problem}"):
            matched(**{"labels": [0, 0], **options})

    def test_a_class_without_data_is_named(self) -> None:
        with pytest.raises(DataError, match=r"needs an \(empty\) folder.*: b\.$"):
            matched([0, 1], ("a", "c"), rows=("c", "a", "b"))
        assert matched([0, 2], ("a", "b", "c"), rows=("c", "a", "b")) == [
            1,
            0,
        ]  # b has a folder, and no image

    def test_other_words_count_in_their_order(self) -> None:
        assert matched([0, 1], ("AnnualCrop", "Forest"), classes=("annual crop land", "forest")) == [0, 1]
        assert matched([0, 1], ("0", "1"), classes=("cat", "dog"), count=2) == [0, 1]

    def test_unlabelled_images_stay(self) -> None:
        given = Images(torch.zeros(2, 1, 1, dtype=torch.int64))
        assert match_labels("x", given, ("a", "b")) is given
