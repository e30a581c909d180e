"""Every notebook runs from its first cell to its last, with few steps, and becomes an .ipynb."""

import json
import logging
import runpy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import REPOSITORY

from adamerge.static import METHODS

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.py"))
# What the last lines say, where each came to its end.
ENDS = {
    "01_merge_your_own_models": "is what open_clip loads",
    "02_adapt_and_read_the_coefficients": "without mnist",
    "03_ablations": "| selector |",
    "04_per_input_merging": "model.safetensors",
    "05_write_a_method": "| entropy - balance |",
}


def test_all_are_known() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(ENDS)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give an empty folder to run in; take back what notebooks leave in the process."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    monkeypatch.setenv("ADAMERGE_FAST", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    level, known = logging.getLogger("pytorch_lightning").level, set(METHODS)
    yield tmp_path / "here"
    plt.close("all")
    logging.getLogger("pytorch_lightning").setLevel(level)
    for name in METHODS.keys() - known:
        del METHODS[name]


@pytest.mark.no_cover
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end_and_leaves_nothing_behind(
    notebook: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(notebook), run_name="__main__")
    assert ENDS[notebook.stem] in "".join(capsys.readouterr().out.rstrip().splitlines()[-5:])
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_becomes_an_ipynb(notebook: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    document = json.loads(jupytext.writes(jupytext.read(notebook), fmt="ipynb"))
    kinds = [cell["cell_type"] for cell in document["cells"]]
    assert kinds[0] == kinds[-1] == "markdown"
    assert kinds.count("code") >= 5
