"""Only what adamerge wrote is ever removed: by its list, or by what only earlier versions' folders hold."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adamerge import ownership
from adamerge.atomic import atomic_file, atomic_folder, refuse_existing, write_text
from adamerge.errors import InputError
from adamerge.ownership import LIST, LOCK, NEW, claimed, kind_of, promote, survey

INPUTS = {"schema_version": 1, "weights": {}, "data": {}, "config": {}}


def tree(folder: Path) -> dict[str, str]:
    """Give the text of every file by its path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def write(folder: Path, *names: str) -> Path:
    """Make files whose text is their own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def old_run(folder: Path) -> Path:
    """Make what a run of a version before the list leaves."""
    write(folder, "config.yaml", "curves.csv", "coefficients.csv", "checkpoints/last.ckpt", "result.json")
    write(folder, "checkpoints/epoch=0-step=17.ckpt", "merged/README.md", "merged/config.json")
    (folder / "inputs.json").write_text(json.dumps(INPUTS))
    (folder / "merged" / "adamerge.json").write_text('{"schema_version": 1, "kind": "checkpoint"}')
    return folder


def old_table(folder: Path) -> Path:
    """Make what a table of a version before the list leaves."""
    write(folder, "benchmark.yaml", "results.csv", "accuracy.png", "methods/average.stamp", "report.md")
    write(
        folder, "methods/average/result.json", "statistics/gram-0123456789abcdef-0123456789abcdef.safetensors"
    )
    old_run(folder / "methods" / "default")
    return folder


def old_model(folder: Path) -> Path:
    """Make what `adamerge merge` of a version before the list leaves."""
    write(folder, "config.json", "tokenizer.json")
    (folder / "README.md").write_text("---\n---\n\n# Merged by adamerge 0.1.0: ties\n")
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt", "adamerge": "{}"})
    return folder


def run(folder: Path) -> Path:
    """Make a run as this version does."""
    with claimed(folder, "run"):
        write_text(folder / "inputs.json", json.dumps(INPUTS))
        write_text(folder / "checkpoints" / "last.ckpt", "last")
        with atomic_folder(folder / "merged") as made:
            (made / "model.safetensors").write_text("weights")
    return folder


MAKERS = [old_run, old_table, old_model, run]


@pytest.mark.parametrize("make", MAKERS)
def test_all_that_we_write_is_recognised(make, tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    assert survey(folder).unknown == []
    assert set(survey(folder).files) == set(tree(folder))
    refuse_existing(folder, overwrite=True)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("place", ["", "checkpoints/", "methods/", "merged/", "wandb/", "src/deep/"])
def test_what_somebody_else_wrote_is_a_refusal_that_names_it(make, place: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    write(folder, f"{place}thesis.tex")
    before = tree(folder)
    named = place.partition("/")[0] if place else "thesis.tex"
    with pytest.raises(
        InputError, match=rf"holds what adamerge did not write: .*{named}.*\.\nMove that away"
    ):
        refuse_existing(folder, overwrite=True)
    with pytest.raises(InputError), atomic_folder(folder, overwrite=True):
        pytest.fail("began")
    assert tree(folder) == before


def test_names_alone_make_no_folder_ours(tmp_path: Path) -> None:
    for name in (
        "inputs.json",
        "manifest.json",
        "config.yaml",
        "result.json",
        "adamerge.json",
        "benchmark.yaml",
    ):
        folder = write(tmp_path / name.replace(".", "_"), name, "checkpoints/a", "methods/b")
        assert kind_of(folder) is None
        assert survey(folder).files == []
        with pytest.raises(InputError, match="adamerge did not write"):
            refuse_existing(folder, overwrite=True)


@pytest.mark.parametrize("place", ["data", "merged/data", "checkpoints/last.ckpt", "config.yaml"])
def test_a_link_is_never_followed(place: str, tmp_path: Path) -> None:
    folder, mine = run(tmp_path / "out"), write(tmp_path / "mine", "thesis.tex")
    (folder / place).unlink(missing_ok=True)
    (folder / place).symlink_to(mine if place.endswith("data") else mine / "thesis.tex")
    with pytest.raises(InputError, match="adamerge did not write"):
        refuse_existing(folder, overwrite=True)
    assert tree(mine) == {"thesis.tex": "thesis.tex"}


def test_an_output_within_ours_is_not_ours(tmp_path: Path) -> None:
    """Another command's output that a user put into a run's folder stays."""
    folder = run(tmp_path / "out")
    with atomic_folder(folder / "average") as made:
        (made / "model.safetensors").touch()
    assert survey(folder).unknown == ["average/"]


def test_the_list_grows_as_files_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with claimed(folder, "run"):
        assert (folder / LOCK).exists()
        write_text(folder / "a.txt", "a")
        assert survey(folder).files == [LIST, "a.txt"]
        with atomic_file(folder / "b.txt") as file:
            file.write_text("half")
            assert survey(folder).unknown == []  # a temporary is ours
    assert kind_of(folder) == "run"
    assert sorted(os.listdir(folder)) == [LIST, "a.txt", "b.txt"]


def test_a_line_that_a_kill_cut_off_names_nothing(tmp_path: Path) -> None:
    folder = write(run(tmp_path / "out"), "results")
    with (folder / LIST).open("a") as stream:
        stream.write('"resul')
    assert survey(folder).unknown == ["results"]


def test_somebodys_file_in_the_way_stays(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", "notes.txt")
    with claimed(folder, "table"), pytest.raises(InputError, match=r"notes\.txt is in the way"):
        write_text(folder / "notes.txt", "new")
    assert tree(folder) == {"notes.txt": "notes.txt"}


@pytest.mark.parametrize(
    "name", ["benchmark.yaml", "report.md", "results.csv", "methods/mine.py", "merged/a"]
)
def test_a_table_begins_in_no_folder_whose_files_it_would_replace(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "out", name, "other.txt")
    refused = pytest.raises(InputError, match=f"and {name.partition('/')[0]} of somebody else")
    with refused, claimed(folder, "table"):
        pytest.fail("began")
    assert set(tree(folder)) == {name, "other.txt"}


def test_a_claim_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed(tmp_path / "deep" / "out", "run"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def replacement(folder: Path) -> None:
    with claimed(folder / NEW, "run", lock=False):
        write_text(folder / NEW / "inputs.json", json.dumps(INPUTS))
        write_text(folder / NEW / "new.txt", "new")


@pytest.mark.parametrize("make", [old_run, run])
def test_the_old_output_stays_until_the_new_one_is_complete(make, tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    before = tree(folder)
    with claimed(folder, "run"):
        replacement(folder)
        assert before.items() <= tree(folder).items()
        promote(folder)
    assert set(tree(folder)) == {LIST, "inputs.json", "new.txt"}
    assert survey(folder).unknown == []
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []


def test_a_kill_while_it_takes_the_place_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop after each rename and each removal; the next start completes what was decided."""
    for stop in range(8):
        folder = run(tmp_path / f"out{stop}")
        replacement(folder)
        calls = iter(range(99))

        def counted(change, calls=calls, stop=stop):
            def call(*args, **kwargs):
                if next(calls) == stop:
                    raise KeyboardInterrupt
                return change(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            with contextlib.suppress(KeyboardInterrupt):
                promote(folder)
        is_decided = (folder / NEW / ownership._SWAP).exists() or not (folder / NEW).exists()
        with claimed(folder, "run"):
            pass
        names = set(tree(folder))
        assert (
            names == {LIST, "inputs.json", "new.txt"} if is_decided else "merged/model.safetensors" in names
        )


def test_what_a_user_adds_meanwhile_stays(tmp_path: Path) -> None:
    folder = run(tmp_path / "out")
    replacement(folder)
    write(folder, "notes.txt")
    promote(folder)
    assert set(tree(folder)) == {LIST, "inputs.json", "new.txt", "notes.txt"}
    replacement(folder)
    write(folder / NEW, "notes.txt")
    with pytest.raises(InputError, match=r"notes\.txt would be lost"):
        promote(folder)
    assert tree(folder)["notes.txt"] == "notes.txt"


def test_temporaries_of_dead_processes_are_swept_beside_our_files_only(tmp_path: Path) -> None:
    folder = run(tmp_path / "out")
    stale = ["checkpoints/.last.ckpt.tmp-99999999/last.ckpt", ".merged.tmp-99999999/a"]
    write(folder, *stale, "mine/.last.ckpt.tmp-99999999/a")
    with claimed(folder, "run"):
        assert not any((folder / name).exists() for name in stale)
    assert (folder / "mine/.last.ckpt.tmp-99999999/a").exists()


FILES = {
    "marked": lambda file: save_file({"w": torch.zeros(1)}, file, {"adamerge": "{}"}),
    "converted": lambda file: save_file({"w": torch.zeros(1)}, file, {"converted_by": "adamerge 0.1.0"}),
    "plain": lambda file: save_file({"w": torch.zeros(1)}, file, {"format": "pt"}),
    "text": lambda file: file.write_text("years of work"),
    "empty": lambda file: file.write_text(""),
    "json": lambda file: file.write_text('{"adamerge": 1}'),
    "manifest.yaml": lambda file: file.write_text(
        f"cars:\n  n_test: 3\n  digest: {hashlib.sha256().hexdigest()}\n  classes:\n  - a\n"
    ),
    "config.yaml": lambda file: file.write_text("model:\n  base: x\n"),
}
OURS = {"marked", "converted", "manifest.yaml"}


@pytest.mark.parametrize("kind", FILES)
def test_a_single_file_is_replaced_if_it_bears_our_mark(kind: str, tmp_path: Path) -> None:
    FILES[kind](tmp_path / kind)
    if kind in OURS:
        refuse_existing(tmp_path / kind, overwrite=True)
    else:
        with pytest.raises(InputError, match="cannot be replaced: adamerge did not write it"):
            refuse_existing(tmp_path / kind, overwrite=True)


def test_no_output_takes_the_place_of_an_input(tmp_path: Path) -> None:
    base = old_model(tmp_path / "base")
    for out in (base, base / "inside", tmp_path, base / "model.safetensors"):
        with pytest.raises(InputError, match="would replace the base"):
            refuse_existing(out, overwrite=True, inputs={"the base": base})
    link = tmp_path / "link"
    link.symlink_to(base)
    with pytest.raises(InputError, match="would replace the base"):
        refuse_existing(link, overwrite=True, inputs={"the base": base})
    refuse_existing(tmp_path / "out", overwrite=True, inputs={"the base": base, "a hub id": "org/name"})
