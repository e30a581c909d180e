"""The default recipe: used where nothing says how coefficients are learned, and nowhere else."""

from pathlib import Path

import pytest
import yaml
from builders import fit_arguments, method, write_benchmark
from conftest import rows_of

from adamerge.cli import main
from adamerge.shipped import configs, default_recipe, names_a_method


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.base", "b"], False),
        (["--trainer.max_steps", "5"], False),
        (["--model.objective", "adamerge.Entropy"], True),
        (["--model.objective=adamerge.Entropy"], True),
        (["--model.objective.class_path", "adamerge.Entropy"], True),
        (["--model.optimizer.init_args.lr", "0.1"], False),
        (["--config", str(configs() / "benchmarks" / "embedded.yaml")], False),
        (["--config", str(method("adamerging_layer_wise"))], True),
        ([f"--config={method('twin_merging')}"], True),
        (["--config", "no such file"], False),
    ],
)
def test_a_command_line_names_a_method_or_not(arguments: list[str], named: bool) -> None:
    assert names_a_method(arguments) is named


def test_every_shipped_method_file_names_one() -> None:
    files = list((configs() / "methods").glob("*.yaml"))
    assert default_recipe() in files
    assert all(names_a_method(["--config", str(file)]) for file in files)


def test_a_run_without_a_method_uses_the_recipe(clip: Path, tmp_path: Path, pictures: Path) -> None:
    benchmark = write_benchmark(tmp_path / "b", clip, rows_of(pictures))
    run = ["fit", "--config", str(benchmark), "--run_dir", str(tmp_path / "run"), "--trainer.max_steps", "2"]
    assert main([*run, "--model.optimizer.init_args.lr", "0.01"]) == 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    recipe = yaml.safe_load(default_recipe().read_text())
    assert settings["method"] == "default"
    assert settings["model"]["coefficients"]["class_path"].endswith("Elements")
    assert settings["model"]["coefficients"]["init_args"]["per"] == "row"
    assert settings["model"]["decay"] == recipe["model"]["decay"]
    assert settings["trainer"]["max_steps"] == 2
    assert settings["model"]["optimizer"]["init_args"]["lr"] == 0.01
    assert (tmp_path / "run" / "merged").is_dir()
    named = tmp_path / "named"
    assert main([*fit_arguments(benchmark, named), "--trainer.max_steps", "1"]) == 0
    assert yaml.safe_load((named / "config.yaml").read_text())["model"]["decay"] == "none"
