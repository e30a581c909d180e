"""A table of methods: each row once, continued after an interruption; and the demo on the shipped zoo."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from builders import write_benchmark
from conftest import TASKS
from safetensors.torch import save_file

from adamerge import merge, open_checkpoint
from adamerge.benchmarks import Benchmark, configs, expert_statistics
from adamerge.benchmarks import run as benchmark_module
from adamerge.checkpoints import locate
from adamerge.commands import runs
from adamerge.errors import InputError
from adamerge.fitting import run
from adamerge.models import Head

METHODS = ("zero_shot", "individual", "average", "adamerging_task_wise", "adamerging_layer_wise")
SHORT = dict.fromkeys(METHODS, ("--trainer.max_steps", "3"))


@pytest.fixture
def tiny(tmp_path: Path, clip: Path, rows: dict) -> Benchmark:
    return Benchmark(write_benchmark(tmp_path, clip, rows), tmp_path / "out")


def test_rows_are_what_their_methods_say(tiny: Benchmark, tmp_path: Path) -> None:
    rows = {row.method: row for row in tiny.run(METHODS, SHORT)}
    assert list(rows) == list(METHODS)
    individual = rows["individual"].accuracy
    for row in rows.values():
        assert row.mean == pytest.approx(sum(row.accuracy.values()) / len(TASKS))
        if all(individual.values()):
            assert row.normalized_mean is not None
    average = merge(tiny.models.vectors, "average")
    assert rows["average"].accuracy == tiny.models.accuracy(lambda _: tiny.models.read(average)).known
    base = tiny.models.vectors.base_state()
    assert rows["zero_shot"].accuracy == tiny.models.accuracy(lambda _: tiny.models.read(base)).known


def test_a_table_whose_rows_are_finished_holds_no_expert(tiny: Benchmark) -> None:
    methods = ("zero_shot", "average")
    tiny.run(methods)
    assert "vectors" in vars(tiny.models)
    again = Benchmark(tiny.config, tiny.out)
    again.run(methods)
    assert "vectors" not in vars(again.models)


def test_the_task_unknown_is_a_column_and_a_table_of_its_own(tiny: Benchmark) -> None:
    methods = ("zero_shot", "individual", "oracle", "twin_merging", "smile")
    few = ("--trainer.max_steps", "2", "--data.batch_size", "4")
    rows = tiny.run(methods, {"twin_merging": few})
    tiny.write(rows, "a title")
    lines = list(csv.DictReader((tiny.out / "results.csv").read_text().splitlines()))
    unknown = {row.method: row.unknown for row in rows}
    assert unknown["individual"] == unknown["oracle"] == {}
    for line in lines:
        found = unknown[line["method"]]
        assert line["task unknown"] == (f"{sum(found.values()) / len(TASKS):.1f}" if found else "-")
    by_task = list(csv.DictReader((tiny.out / "results_task_unknown.csv").read_text().splitlines()))
    assert [line["method"] for line in by_task] == ["zero_shot", "twin_merging", "smile"]
    for line in by_task:
        assert [line[task] for task in TASKS] == [f"{unknown[line['method']][task]:.1f}" for task in TASKS]


def test_an_interrupted_table_continues_where_it_stopped(
    tiny: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def stop_in_the_second(arguments: list[str], **options: bool) -> object:
        calls.append(arguments[arguments.index("--run_dir") + 1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(arguments, **options)

    monkeypatch.setattr(benchmark_module, "run", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(METHODS, SHORT)
    monkeypatch.setattr(tiny.models, "evaluate", lambda _: pytest.fail("static rows were finished"))
    rows = tiny.run(METHODS, SHORT)
    assert len(rows) == len(METHODS)
    assert [Path(call).name for call in calls] == [METHODS[3], METHODS[4], METHODS[4]]


def test_a_run_that_was_cut_is_resumed_not_repeated(tiny: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.folder("adamerging_layer_wise")
    tiny.run(["adamerging_layer_wise"], SHORT)
    for name in ("manifest.json", "result.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "merged")
    seen: list[list[str]] = []

    def remember(arguments: list[str], **options: bool) -> object:
        seen.append(arguments)
        return run(arguments, **options)

    monkeypatch.setattr(benchmark_module, "run", remember)
    tiny.run(["adamerging_layer_wise"], SHORT)
    assert "--ckpt_path" in seen[0]
    assert (folder / "merged" / "open_clip_model.safetensors").exists()
    tiny.run(["adamerging_layer_wise"], SHORT)
    assert len(seen) == 1


def test_a_row_of_other_options_is_computed_anew(tiny: Benchmark) -> None:
    folder = tiny.folder("adamerging_layer_wise")
    for steps in ("3", "2"):
        tiny.run(["adamerging_layer_wise"], {"adamerging_layer_wise": ("--trainer.max_steps", steps)})
        assert (folder / "curves.csv").read_text().splitlines()[-1].startswith(f"{steps},")


def test_rows_of_changed_images_labels_or_heads_are_computed_anew(
    clip: Path, pictures: Path, rows: dict, tmp_path: Path
) -> None:
    test, head = tmp_path / "test", tmp_path / "head.safetensors"
    shutil.copytree(pictures / "dots" / "test", test)
    save_file({"weight": torch.eye(2, 12)}, head)
    rows["dots"] |= {"test": str(test), "head": str(head)}
    file = write_benchmark(tmp_path, clip, rows)

    def computed() -> dict[Path, float]:
        table = Benchmark(file, tmp_path / "out")
        table.run(["individual", "average"])
        return {path: path.stat().st_mtime_ns for path in table.out.rglob("result.json")}

    found = [computed()]
    assert computed() == found[0]
    for change in (
        lambda: shutil.copy(test / "0_one" / "2.png", test / "0_one" / "0.png"),
        lambda: (test / "0_one" / "8.png").rename(test / "1_two" / "0.png"),  # images keep their order
        lambda: save_file({"weight": -torch.eye(2, 12)}, head),
    ):
        change()
        found.append(computed())
        assert not found[-1].items() & found[-2].items()


def test_static_rows_name_the_images_that_they_depend_on(tiny: Benchmark) -> None:
    average, fisher = tiny.run(["average", "fisher"])
    tests = {f"{task} test" for task in TASKS}
    assert set(average.provenance["data"]) == tests
    assert set(fisher.provenance["data"]) == tests | {f"{task} adaptation" for task in TASKS}


def test_images_of_a_task_without_expert_are_not_adapted_on(clip: Path, rows: dict, tmp_path: Path) -> None:
    document = yaml.safe_load(write_benchmark(tmp_path, clip, rows).read_text())
    document["model"]["experts"].pop("dots")
    with pytest.raises(InputError, match="'?dots'? would be adapted on.\nRemove data.tasks.TASK.adapt"):
        Benchmark(document, tmp_path / "out")
    document["data"]["tasks"]["dots"].pop("adapt")
    assert Benchmark(document, tmp_path / "out").unseen == ["dots"]


def test_fisher_diagonals_are_of_their_heads(tiny: Benchmark) -> None:
    def measured(heads: dict[str, Head]) -> torch.Tensor:
        opened = tiny.models.vectors, tiny.models.backbone, heads, tiny.data, tiny.models.digests
        return expert_statistics(*opened, samples=2, cache=tiny.out)["fisher"]("visual.proj", {})

    doubled = {task: replace(head, weight=2 * head.weight) for task, head in tiny.models.heads.items()}
    before = measured(tiny.models.heads)
    assert not torch.equal(measured(doubled), before)
    assert torch.equal(measured(tiny.models.heads), before)


def test_the_demo_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is not empty and holds no demo"):
            runs.demo(str(tmp_path), overwrite=overwrite)
    assert (tmp_path / "thesis.tex").exists()


def test_an_unknown_method_names_the_nearest(tiny: Benchmark) -> None:
    with pytest.raises(
        InputError, match=r"'adamerging_layerwise' is unknown.\nDid you mean 'adamerging_layer_wise'"
    ):
        tiny.run(["adamerging_layerwise"])


def test_two_files_of_one_name_are_refused(tiny: Benchmark, tmp_path: Path) -> None:
    own = tmp_path / "adamerging_layer_wise.yaml"
    own.write_text("")
    with pytest.raises(InputError, match="two methods have one name"):
        tiny.run(["adamerging_layer_wise", str(own)])


def test_embedded_models_are_found_by_name(tmp_path: Path) -> None:
    assert (locate("embedded:base") / "open_clip_config.json").exists()
    assert locate("embedded:mnist").exists()
    assert locate(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match=r"'mnits' is unknown.\nDid you mean 'mnist'?"):
        locate("embedded:mnits")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert runs.demo(str(out)) == 0  # and warns of nothing: the selector judged what was learned
    return out


@pytest.mark.no_cover
@pytest.mark.slow
def test_the_demo_shows_what_the_readme_claims(demo: Path) -> None:
    table = json.loads((demo / "results.json").read_text())
    mean = {row["method"]: row["mean"] for row in table["rows"]}
    assert tuple(mean) == runs.DEMO_METHODS
    static = max(mean[name] for name in ("average", "task_arithmetic", "ties"))
    assert mean["individual"] >= 88
    assert mean["zero_shot"] < static < mean["adamerging_layer_wise"] < mean["individual"]
    closed = (mean["default"] - static) / (mean["individual"] - static)
    assert closed >= 0.65  # the README's table has 0.75; other processors round otherwise
    assert mean["default"] == max(value for name, value in mean.items() if name != "individual")
    for row in table["rows"]:
        assert set(row["accuracy"]) == set(table["tasks"])
        assert row["transductive"] == []


@pytest.mark.no_cover
@pytest.mark.slow
def test_the_demo_leaves_pictures_curves_a_merged_model_and_an_offline_run(demo: Path) -> None:
    for name in ("accuracy.png", "coefficients.png", "curves.png"):
        assert (demo / name).read_bytes().startswith(b"\x89PNG")
    assert (demo / "results.md").read_text().count("\n") == 2 + len(runs.DEMO_METHODS)
    model = open_clip.create_model(f"local-dir:{demo / 'merged'}")
    assert torch.isfinite(model.encode_image(torch.zeros(1, 3, 28, 28))).all()
    assert (demo / "merged" / "README.md").read_text().startswith("---\ntags:\n- merge")
    assert list(demo.rglob("run-*.wandb"))
    assert set(open_checkpoint(demo / "merged")) == set(open_checkpoint(locate("embedded:base")))


@pytest.mark.no_cover
@pytest.mark.slow
def test_a_finished_demo_is_not_computed_again(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (demo / "results.json").read_bytes()
    monkeypatch.setattr(benchmark_module, "run", lambda _: pytest.fail("computed again"))
    assert runs.demo(str(demo)) == 0
    assert (demo / "results.json").read_bytes() == before


def test_the_configurations_travel_with_the_package() -> None:
    assert (configs() / "benchmarks" / "embedded.yaml").exists()
    assert {path.stem for path in (configs() / "methods").glob("*.yaml")} >= set(runs.DEMO_METHODS[5:])
