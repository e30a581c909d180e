"""The default recipe: below whatever names no method, part by part, and nowhere else."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import fit_arguments, method, write_benchmark
from conftest import rows_of

from adamerge.cli import main
from adamerge.errors import InputError
from adamerge.shipped import configs, default_recipe, named_parts, names_a_method, recipe_under

RECIPE = yaml.safe_load(default_recipe().read_text())
IN_ONE_LINE = "coefficients Elements(per=row, initial=0.3); objective KLTeacher(temperature=2.0)"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.base", "b"], {}),
        (["--trainer.max_steps", "5"], {}),
        (["--model.objective", "adamerge.Entropy"], {"objective": "adamerge.Entropy"}),
        (["--model.objective=adamerge.Entropy"], {"objective": "adamerge.Entropy"}),
        (["--model.objective.class_path", "adamerge.Entropy"], {"objective": "adamerge.Entropy"}),
        (['--model.objective={"class_path": "adamerge.Prior"}'], {"objective": "adamerge.Prior"}),
        (["--model.optimizer.init_args.lr", "0.1"], {}),
        (["--model.edit", "ties_trim"], {"edit": "ties_trim"}),
    ],
)
def test_the_parts_that_a_command_line_names(arguments: list[str], named: dict[str, str]) -> None:
    assert named_parts(arguments) == named


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.objective", "adamerge.Entropy"], False),
        (["--config", str(configs() / "benchmarks" / "embedded.yaml")], False),
        (["--config", str(method("adamerging_layer_wise"))], True),
        ([f"--config={method('twin_merging')}"], True),
    ],
)
def test_a_file_names_a_method_or_not(arguments: list[str], named: bool) -> None:
    assert names_a_method(arguments) is named


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(InputError, match="'no such file' does not exist"):
        names_a_method(["--config", "no such file"])


def test_every_shipped_method_file_names_one() -> None:
    files = list((configs() / "methods").glob("*.yaml"))
    assert default_recipe() in files
    assert all(names_a_method(["--config", str(file)]) for file in files)


@pytest.mark.parametrize("name", ["adamerge.KLTeacher", "KLTeacher", "adamerge.objectives.KLTeacher"])
def test_naming_the_recipes_own_part_changes_nothing(name: str) -> None:
    assert recipe_under({"objective": name}) == RECIPE


def test_a_part_of_another_class_brings_its_own_options_and_leaves_the_others_alone() -> None:
    recipe = recipe_under({"optimizer": "torch.optim.SGD"})
    assert recipe.pop("method") == "default with optimizer SGD"
    assert recipe["model"] == {k: v for k, v in RECIPE["model"].items() if k != "optimizer"}
    assert recipe["trainer"] == RECIPE["trainer"]
    assert recipe_under({"optimizer": "mine.Adam"})["method"] == "default with optimizer Adam"


def settings_of(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


@pytest.fixture
def command(clip: Path, tmp_path: Path, pictures: Path) -> list[str]:
    benchmark = write_benchmark(tmp_path / "b", clip, rows_of(pictures))
    files = ["--config", str(benchmark), "--run_dir", str(tmp_path / "run")]
    return ["fit", *files, "--trainer.max_steps", "2"]


def test_a_run_without_a_method_uses_the_recipe(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--model.optimizer.init_args.lr", "0.01"]) == 0
    settings = settings_of(tmp_path / "run")
    assert settings["method"] == "default"
    assert settings["model"]["coefficients"]["class_path"].endswith("Elements")
    assert settings["model"]["coefficients"]["init_args"]["per"] == "row"
    assert settings["model"]["decay"] == RECIPE["model"]["decay"]
    assert settings["trainer"]["max_steps"] == 2
    assert settings["model"]["optimizer"]["init_args"]["lr"] == 0.01
    line = f"{IN_ONE_LINE}; optimizer Adam(lr=0.01); decay linear; 2 steps"
    assert f"Recipe: {line}.\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["details"]["recipe"] == line
    assert line in (tmp_path / "run" / "merged" / "README.md").read_text()


def test_a_part_on_the_command_line_leaves_the_recipes_others(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--model.objective", "adamerge.Entropy", "--model.edit", "ties_trim"]) == 0
    settings = settings_of(tmp_path / "run")
    assert settings["method"] == "default with objective Entropy, edit ties_trim"
    expected = RECIPE["model"]
    assert settings["model"]["objective"]["class_path"] == "adamerge.Entropy"
    assert settings["model"]["objective"]["init_args"] == {"normalize": "none"}
    assert settings["model"]["optimizer"]["init_args"]["lr"] == expected["optimizer"]["init_args"]["lr"]
    assert settings["model"]["coefficients"]["init_args"]["per"] == "row"
    assert settings["model"]["decay"] == expected["decay"]
    told = capsys.readouterr().err
    assert "the default recipe is used (default.yaml) but for objective, edit." in told
    assert "objective Entropy; optimizer Adam(lr=0.03); edit ties_trim; decay linear; 2 steps" in told


def test_lightnings_short_flag_names_files_too(command: list[str], tmp_path: Path) -> None:
    method = tmp_path / "method.yaml"
    method.write_text("method: plain\nmodel: {objective: {class_path: adamerge.Entropy}}\n")
    assert main(["fit", "-c", command[2], "-c", str(method), *command[3:]]) == 0
    settings = settings_of(tmp_path / "run")
    assert settings["method"] == "plain"
    assert settings["model"]["decay"] == "none"  # nothing of the default recipe


def test_options_are_not_abbreviated(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--trainer.max_step", "3"]) == 2
    assert "Did you mean 'trainer.max_steps'?" in capsys.readouterr().err
    assert main([*command, "--model.objective", "adamerge.Entopy"]) == 2
    assert "no class 'adamerge.Entopy'.\nDid you mean 'Entropy'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_method_file_stands_for_itself(clip: Path, tmp_path: Path, pictures: Path) -> None:
    benchmark = write_benchmark(tmp_path / "b", clip, rows_of(pictures))
    arguments = fit_arguments(benchmark, tmp_path / "named", "--trainer.max_steps", "1")
    assert main([*arguments, "--model.objective", "adamerge.KLTeacher"]) == 0
    settings = settings_of(tmp_path / "named")
    assert settings["model"]["decay"] == "none"
    assert settings["model"]["coefficients"]["class_path"].endswith("Learned")
    assert settings["model"]["objective"]["class_path"].endswith("KLTeacher")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            ["--model.coefficients", "adamerge.Router"],
            "Router makes another model for every input, and the default recipe's objective and optimizer",
        ),
        (["--model.objective", "adamerge.TaskIdentity"], "TaskIdentity needs a router."),
        (["--model.optimizer", "adamerge.FrankWolfe"], "FrankWolfe needs one matrix [task, group]"),
        (["--model.optimizer", "adamerge.CMAES"], "CMAES needs one matrix [task, group]"),
        (
            ["--model.optimizer", "adamerge.CMAES", "--model.coefficients", "adamerge.Learned"],
            "CMAES has no learning rate to decay.\nUse decay: none.",
        ),
        (
            ["--model.coefficients", '{"class_path": "Learned", "init_args": {"frozen": true}}'],
            "nothing to learn",
        ),
    ],
)
def test_what_cannot_stand_beside_the_recipe_is_refused_with_the_reason(
    parts: list[str], reason: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *parts]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
