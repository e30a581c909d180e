"""Pictures show the numbers that they were given, and are files of the right kind."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from adamerge.errors import EnvironmentProblem
from adamerge.plots import (
    accuracy_bars,
    block_map,
    bytes_curve,
    heat_map,
    learning_curves,
    pair_map,
    routing_map,
    save_picture,
    write_routing,
)
from adamerge.results import make_row

pytest.importorskip("matplotlib")


def test_the_heat_map_is_centred_on_zero_and_names_rows_and_columns() -> None:
    values = torch.tensor([[0.1, -0.4], [0.3, 0.2]])
    figure = heat_map(["cars", "digits"], ["visual.proj", "visual.transformer.resblocks.1"], values)
    (image,) = figure.axes[0].images
    assert torch.equal(torch.tensor(image.get_array()), values)
    assert image.get_clim() == pytest.approx((-0.4, 0.4), rel=0.02)  # the 98 % quantile
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["cars", "digits"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["proj", "block 1"]


def test_the_heat_map_of_zeros_is_white() -> None:
    (image,) = heat_map(["cars"], ["all"], torch.zeros(1, 1)).axes[0].images
    assert image.norm(0.0) == 0.5


def test_bars_are_means_and_dots_are_tasks() -> None:
    rows = [make_row("ties", {"cars": 60.0, "digits": 90.0}), make_row("merged", {"cars": 70.0})]
    (axes,) = accuracy_bars(rows).axes
    assert [bar.get_width() for bar in axes.patches] == [75, 70]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["ties", "merged"]
    cars, digits = axes.lines
    assert list(cars.get_xdata()) == [60, 70]
    assert digits.get_xdata()[0] == 90
    assert digits.get_xdata()[1] != digits.get_xdata()[1]  # NaN: no dot


def test_rows_without_accuracy_get_no_bar() -> None:
    (axes,) = accuracy_bars([make_row("unmeasured", {}), make_row("ties", {"cars": 60.0})]).axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["ties"]
    assert not accuracy_bars([make_row("unmeasured", {})]).axes[0].patches


def test_curves_skip_steps_at_which_a_task_had_no_loss(tmp_path: Path) -> None:
    (tmp_path / "curves.csv").write_text("step,cars,digits\n0,1.5,2\n1,,1\n2,0.5,0\n")
    (axes,) = learning_curves(tmp_path / "curves.csv").axes
    assert [(line.get_label(), list(line.get_xdata())) for line in axes.lines] == [
        ("cars", [0, 2]),
        ("digits", [0, 1, 2]),
    ]


@pytest.mark.parametrize("text", ["step,cars\n", "step,cars\n0,\n"])
def test_curves_of_a_run_without_losses_are_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "curves.csv").write_text(text)
    save_picture(tmp_path / "curves.png", lambda: learning_curves(tmp_path / "curves.csv"))
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_picture_is_a_png_with_ordinary_permissions(tmp_path: Path) -> None:
    save_picture(tmp_path / "new" / "heat.png", lambda: heat_map(["a"], ["b"], torch.ones(1, 1)))
    assert (tmp_path / "new" / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_message_tells_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install matplotlib") as caught:
        save_picture(tmp_path / "heat.png", lambda: heat_map(["a"], ["b"], torch.ones(1, 1)))
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_blocks_are_drawn_from_zero_and_pairs_over_their_whole_range() -> None:
    values = torch.tensor([[0.1, float("nan")], [0.3, 0.2]])
    (image,) = block_map(["cars", "digits"], ["h.0", "h.1"], values, "norm").axes[0].images
    assert image.get_clim() == pytest.approx((0, 0.3))
    (image,) = pair_map(["a", "b"], torch.eye(2), "cosine", signed=True).axes[0].images
    assert image.get_clim() == (-1, 1)
    (image,) = pair_map(["a", "b"], torch.eye(2), "conflict").axes[0].images
    assert image.get_clim() == (0, 1)


def test_pairs_are_written_out() -> None:
    axes = pair_map(["a", "b"], torch.tensor([[1.0, -0.25], [float("nan"), 1.0]]), "cosine").axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "-0.25", "-", "1.00"]


def test_pictures_of_nothing_are_drawn_without_a_complaint(tmp_path: Path) -> None:
    nothing = torch.full((1, 2), float("nan"))
    save_picture(tmp_path / "blocks.png", lambda: block_map(["a"], ["b", "c"], nothing, "norm"))
    save_picture(tmp_path / "pairs.png", lambda: pair_map(["a"], nothing[:, :1], "cosine"))
    assert len(list(tmp_path.iterdir())) == 2


ENTROPY = {"cars, red": 0.25, "digits": 0.0}


class TestRouting:
    def test_weights_are_written_beside_each_tasks_entropy(self) -> None:
        values = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
        (axes,) = routing_map(["cars", "digits"], ["a", "b"], values, [0.25, 1.0]).axes
        assert [text.get_text() for text in axes.texts] == ["1.00", "0.00", "0.50", "0.50"]
        assert axes.images[0].get_clim() == (0, 1)
        (bars,) = axes.child_axes
        assert [bar.get_width() for bar in bars.patches] == [0.25, 1]

    @pytest.mark.parametrize(("values", "limits"), [([[0.5, 2.5]], (0, 2.5)), ([[0.5, -2]], (-2, 2))])
    def test_weights_that_are_no_shares_are_drawn_whole(
        self, values: list, limits: tuple[float, float]
    ) -> None:
        (image,) = routing_map(["cars"], ["a", "b"], torch.tensor(values), [0.5]).axes[0].images
        assert image.get_clim() == limits

    def test_files_hold_every_weight_exactly(self, tmp_path: Path) -> None:
        write_routing(tmp_path, ["a", "b"], {"cars, red": [0.1, 0.9], "digits": [1.0, 0.0]}, ENTROPY)
        with (tmp_path / "routing.csv").open(newline="") as stream:
            header, cars, digits = csv.reader(stream)
        assert header == ["task", "a", "b", "entropy"]
        assert [cars[0], *map(float, cars[1:3])] == ["cars, red", *torch.tensor([0.1, 0.9]).tolist()]
        assert [cars[3], *digits] == ["0.25", "digits", "1.0", "0.0", "0.0"]
        assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_accuracy_is_drawn_against_the_sum_of_stored_bytes() -> None:
    stored = {"shared": {"scalars": 0, "n_bytes": 2**20}, "router": {"scalars": 0, "n_bytes": 2**19}}
    rows = [
        make_row("rank 10", {"cars": 60.0, "digits": 90.0}, details={"stored": stored}),
        make_row("rank 2", {"cars": 50.0}, details={"stored": {"shared": stored["shared"]}}),
        make_row("ties", {"cars": 40.0}),
        make_row("unmeasured", {}, details={"stored": stored}),
    ]
    (axes,) = bytes_curve(rows).axes
    assert [text.get_text() for text in axes.texts] == ["rank 2", "rank 10"]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
    assert points == [(1.0, 50.0), (1.5, 75.0)]
