"""The study: what becomes of a benchmark in each case, and one tiny table."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from builders import REPOSITORY, method, specs, write_benchmark
from conftest import TASKS
from safetensors.torch import load_file

from adamerge import Learned, MultiTaskData, OpenClipBackbone, edit, merge
from adamerge.benchmarks import Benchmark
from adamerge.benchmarks import run as benchmark_module
from adamerge.checkpoints import locate
from adamerge.data.datasets import Images, load_images
from adamerge.data.embedded import load_split
from adamerge.errors import AdamergeWarning, DataError
from adamerge.fitting import merge_task, open_vectors
from adamerge.static import METHODS


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "scripts")
        import study
        import study_cases

        yield study, study_cases


@pytest.fixture
def source(scripts, clip: Path, rows: dict, tmp_path: Path):
    document = yaml.safe_load(write_benchmark(tmp_path, clip, rows, holdout=0.25).read_text())
    return scripts[1].Source(document | {"gate": {"dots": 0.0}}, tmp_path / "made")


def cases(scripts, source, table: str) -> dict:
    return {case.name: case for case in scripts[1].TABLES[table](source)}


def data_of(source, document: dict) -> MultiTaskData:
    """Open a case as the benchmark will."""
    opened = Benchmark(document, source.folder).data
    opened.use(source.benchmark.models.backbone)
    return opened


def test_written_images_are_the_same_pixels_to_the_model(scripts, tmp_path: Path) -> None:
    images = load_split("textures", "adapt")[0][:20]
    scripts[1].write_images(tmp_path / "t.parquet", images)
    backbone = OpenClipBackbone(locate("embedded:base"))
    found = load_images(str(tmp_path / "t.parquet"), backbone.preprocess, labelled=False, role="t")
    assert found.digests() == Images(images).digests()
    with pytest.raises(DataError, match="no 'label'"):
        load_images(str(tmp_path / "t.parquet"), backbone.preprocess, labelled=True, role="t")


def test_streams_differ_in_what_they_say(scripts, source) -> None:
    found = cases(scripts, source, "stress")
    documents = {name: found[name].make() for name in ("clean", "unbalanced", "batch_2", "transductive")}
    sizes = {n: [data_of(source, d).batch_size_of(t) for t in TASKS] for n, d in documents.items()}
    assert sizes == {"clean": [4] * 3, "unbalanced": [40, 4, 4], "batch_2": [2] * 3, "transductive": [4] * 3}
    assert set(data_of(source, documents["transductive"]).transductive().values()) == {9}
    assert set(data_of(source, documents["clean"]).transductive().values()) == {0}
    assert found["gaussian_noise"].make()["data"]["tasks"]["bars"]["adapt_corruption"] == "gaussian_noise/3"
    official = "official_layer_wise"  # its file has a batch size of its own
    options = {n: scripts[0].options_of(official, found[n], 0, 0)[2:4] for n in ("unbalanced", "batch_2")}
    assert options == {"unbalanced": ["--data.batch_size", "4"], "batch_2": ["--data.batch_size", "2"]}
    with pytest.warns(AdamergeWarning, match="single images"):
        assert data_of(source, found["batch_1"].make()).batch_size == 1


@pytest.mark.parametrize("labelled", [True, False])
def test_one_class_batches_come_in_the_order_of_the_classes(scripts, source, labelled: bool) -> None:
    images, first = source.images("bars", labelled=True), torch.randint(0, 3, (12,))
    label_of = dict(zip(images.digests(), (images.labels if labelled else first).tolist(), strict=True))
    if not labelled:

        def no_labels(task: str, *, labelled: bool = False) -> Images:
            if labelled:
                raise DataError("there are none")
            return images

        source.images, source.predicted = no_labels, lambda task: first
    found = data_of(source, cases(scripts, source, "stress")["one_class"].make())
    classes = [label_of[digest] for digest in found.adaptation("bars").digests()]
    assert (found.order, classes) == ("given", sorted(classes))
    assert list(source.notes) == ([] if labelled else ["one_class"])
    if labelled:
        assert found.adaptation_labels("bars").tolist() == classes


def test_predicted_classes_are_the_experts(source) -> None:
    models = source.benchmark.models
    weights = models.read(models.vectors.state(models.vectors.one_hot("bars")))
    logits = models.heads["bars"].logits(models.backbone.features(weights, source.images("bars").images))
    assert torch.equal(source.predicted("bars"), logits.argmax(-1))


def test_corrupted_images_are_adapted_on_alone(scripts, source) -> None:
    found = data_of(source, cases(scripts, source, "stress")["corrupted"].make())
    clean = source.images("bars").images.float()
    noisy = found.all_adaptation("bars").images.float()
    distance = (noisy - clean).abs().mean((1, 2, 3))
    assert (distance > 20).all()
    assert torch.corrcoef(torch.stack([noisy[::3].flatten(), clean[::3].flatten()]))[0, 1].abs() < 0.1
    assert torch.equal(
        found.adaptation_labels("bars"), data_of(source, source.variant()).adaptation_labels("bars")
    )
    assert found.test("bars").digests() == source.benchmark.data.test("bars").digests()


def test_further_experts_have_no_images(scripts, source, clip: Path) -> None:
    found = cases(scripts, source, "stress")
    useless, again = (found[name].make() for name in ("useless", "duplicate"))
    for document, name in ((useless, "useless"), (again, "circles_again")):
        assert list(document["model"]["experts"]) == [*TASKS, name]
        assert list(document["data"]["tasks"]) == list(TASKS)
    assert again["model"]["experts"]["circles_again"] == again["model"]["experts"]["circles"]
    base = load_file(clip / "base" / "open_clip_model.safetensors")
    experts = [load_file(path) for path in useless["model"]["experts"].values()]
    for name in source.benchmark.models.vectors.names:
        *lengths, ours = [(expert[name] - base[name]).norm() for expert in experts]
        assert float(ours) == pytest.approx(float(sum(lengths)) / 3, rel=1e-3)


def test_a_foreign_expert_stays_and_its_images_go(scripts, source) -> None:
    document = cases(scripts, source, "stress")["foreign"].make()
    assert list(document["model"]["experts"]) == list(TASKS)
    assert list(data_of(source, document).tasks) == list(TASKS[:2])


def test_fractions_steps_and_compositions(scripts, source) -> None:
    shots = {name: case.make()["data"]["shots"] for name, case in cases(scripts, source, "fractions").items()}
    assert shots == {"16": 16, "64": 64, "256": 256, "all": 0}
    few = cases(scripts, source, "fractions")["64"]  # some method files have a number of shots of their own
    assert scripts[0].options_of("random_few_shot", few, 0, 0)[2:4] == ["--data.shots", "64"]
    study = scripts[0]
    limits = [
        study.options_of("adamerging_task_wise", case, 1, 0)[-1]
        for case in cases(scripts, source, "steps").values()
    ]
    assert limits == ["15", "30", "60", "120", "240"]
    assert "--trainer.max_steps" not in study.options_of("oracle", cases(scripts, source, "steps")["4"], 1, 9)
    spaces = cases(scripts, source, "grid")
    files = [yaml.safe_load(Path(f).read_text()) for case in spaces.values() for f in case.methods]
    assert len(files) == len(spaces) * len(scripts[1].STARTS) * len(scripts[1].OBJECTIVES)
    assert set(spaces) == {"task", "tensor", "component", "row", "entry"}
    assert {f["model"]["coefficients"]["init_args"]["initial"] for f in files} == {0.0, 0.1, 0.3}


def test_a_start_is_the_static_merge_that_it_names(scripts, clip: Path) -> None:
    cases = scripts[1]
    experts = {task: str(clip / "experts" / f"{task}.safetensors") for task in TASKS}
    vectors = open_vectors(str(clip / "base"), experts)[0]
    for start, row in cases.STARTS.items():
        more = dict(row)
        coefficients = Learned("tensor", more.pop("initial"))
        task = merge_task(str(clip / "base"), experts, specs(), coefficients=coefficients, **more)
        name, options = {
            "start_0.1": ("task_arithmetic", {"scale": 0.1}),
            "start_0.3": ("task_arithmetic", {"scale": 0.3}),
            "start_trimmed": ("ties_trim", {}),
        }.get(start, (start.removeprefix("start_"), {}))
        if name in METHODS:
            expected = merge(vectors, name, dtype=torch.float32, **options)
        else:
            expected = edit(vectors, name, density=0.2)
            expected = expected.state(expected.uniform(0.3))
        for tensor, value in task.merged_state().items():
            torch.testing.assert_close(value, expected[tensor], rtol=1e-4, atol=1e-5)


def test_a_table_has_means_spreads_and_gains(scripts, source, tmp_path: Path, monkeypatch) -> None:
    study = scripts[0]
    file, mine = tmp_path / "benchmark.yaml", tmp_path / "mine.yaml"
    mine.write_text(method("adamerging_task_wise").read_text())
    options = [
        "stress",
        "--benchmark",
        str(file),
        "--cases",
        "clean,duplicate",
        "--seeds",
        "0",
        "--steps",
        "2",
    ]
    options += ["--methods", f"regmean,{mine}", "--out", str(tmp_path / "out")]
    with pytest.warns(AdamergeWarning, match="are equal"):
        study.main(options)
    out = tmp_path / "out"
    static, learned = csv.DictReader((out / "stress.csv").read_text().splitlines())
    assert static["clean minus start"] == static["duplicate"] == static["mean over cases"] == ""
    runs = {(run["method"], run["case"]): run for run in json.loads((out / "stress.json").read_text())}
    gains = {}
    for case in ("clean", "duplicate"):
        run = runs["mine", case]
        gains[case] = sum(run["accuracy"].values()) / 3 - sum(run["accuracy_at_start"].values()) / 3
        assert float(learned[case]) == pytest.approx(run["mean"], abs=1e-3)
        assert float(learned[f"{case} minus start"]) == pytest.approx(gains[case], abs=1e-3)
        assert learned[f"{case} sd"] == ""
    assert float(learned["worst minus start"]) == pytest.approx(min(gains.values()), abs=1e-3)
    text = (out / "stress.md").read_text()
    assert "refused: experts ['circles_again'] have no adaptation images" in text
    assert (out / "stress.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(benchmark_module, "run", lambda _: pytest.fail("computed again"))
    with pytest.warns(AdamergeWarning, match="are equal"):
        study.main(options)
    assert (out / "stress.md").read_text() == text


def test_spreads_are_of_seeds(scripts) -> None:
    study = scripts[0]
    runs = [study.Found("clean", "a", seed, mean, start) for seed, mean, start in ((0, 70, 60), (1, 74, 62))]
    cell = study.cell_of(runs, "a", "clean")
    assert (cell.mean, cell.gain) == (72, 11)
    assert (cell.spread, cell.gain_spread) == pytest.approx((8**0.5, 2**0.5))
    assert study.text_of(cell) == "72.0 ± 2.8 (+11.0)"
    runs.append(study.Found("clean", "a", 2))
    assert study.text_of(study.cell_of(runs, "a", "clean")) == "-"


def test_the_grid_is_drawn_as_a_map_with_holes_where_a_run_was_refused(scripts, tmp_path: Path) -> None:
    study = scripts[0]
    runs = [study.Found("row", "a", 0, 70.04), study.Found("row", "b", 0), study.Found("entry", "a", 0, 60)]
    axes = study.heat_map(runs).axes[0]
    assert [text.get_text() for text in axes.texts] == ["70.0", "60.0", "nan", "nan"]
    study.write(runs, tmp_path, "grid", {})
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
