"""The CLIP benchmarks as data: tasks, counts, checkpoints, and the rows that were published."""

import subprocess
from pathlib import Path

import pytest

from adamerge.benchmarks import define, defined, published_rows
from adamerge.benchmarks.clip import AdaptSplit, _facts, _tasks
from adamerge.data.module import MultiTaskData
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError
from adamerge.results import ResultRow

EIGHT = ["sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
REPOSITORY = Path(__file__).parents[2]


def test_tasks_have_the_counts_of_their_papers() -> None:
    tasks = _tasks()
    assert [tasks[task]["images"] for task in EIGHT] == [19850, 8041, 6300, 2700, 26032, 12630, 10000, 1880]
    assert [len(tasks[task]["classes"]) for task in EIGHT] == [397, 196, 45, 10, 10, 43, 10, 47]
    assert [len(tasks[task]["templates"]) for task in EIGHT] == [2, 8, 18, 3, 1, 3, 1, 8]
    for row in tasks.values():
        assert len(set(row["classes"])) == len(row["classes"])
        assert all(isinstance(name, str) for name in row["classes"])
        assert all(template.count("{}") == 1 for template in row["templates"])
    assert tasks["fer2013"] | {"image_column": "jpg", "label_column": "cls"} == tasks["fer2013"]
    assert tasks["food101"]["test"] == "validation"


@pytest.mark.parametrize(("name", "count"), [("clip8", 8), ("clip14", 14), ("clip20", 20), ("clip4", 4)])
@pytest.mark.parametrize("backbone", ["ViT-B-32", "ViT-B-16", "ViT-L-14"])
def test_every_benchmark_names_models_data_and_premises(name: str, count: int, backbone: str) -> None:
    found = define(name, backbone=backbone)
    model, rows = found.document["model"], found.document["data"]["tasks"]
    hub = _facts()["backbones"][backbone]["hub"]
    assert model["base"] == f"openai/clip-vit-{hub}"
    assert len(model["experts"]) == len(rows) == count
    assert model["experts"]["cars"] == f"tanganke/clip-vit-{hub}_stanford-cars"
    assert set(found.premises.accuracy) == set(found.premises.images) == set(rows)
    data = MultiTaskData({task: TaskSpec(**row) for task, row in rows.items()})
    assert data.tested_tasks == data.adapting_tasks == tuple(rows)


def test_adaptation_images_are_disjoint_unless_asked() -> None:
    def svhn(**options: str) -> dict:
        return define("clip8", **options).document["data"]["tasks"]["svhn"]

    assert svhn()["adapt"] == "ufldl-stanford/svhn#cropped_digits@train"
    assert svhn(adapt_split="test")["adapt"] == svhn()["test"] == "ufldl-stanford/svhn#cropped_digits@test"


def test_emnist_is_letters_or_digits_by_family(tmp_path: Path) -> None:
    assert "emnist_letters" in define("clip20").document["model"]["experts"]
    for task in _tasks():
        (tmp_path / "local" / "tall_masks" / f"ViT-B-32_{task}").mkdir(parents=True)
    tall = define("clip20", family="tall", mirror=str(tmp_path))
    assert "emnist_letters" not in tall.document["model"]["experts"]
    assert tall.document["data"]["tasks"]["emnist_digits"]["classes"].split() == list("0123456789")
    assert tall.premises.accuracy["emnist_digits"] == 99.78


def test_class_names_may_be_the_lines_of_one_text() -> None:
    assert TaskSpec(test="x", classes="a b\nc").classes == TaskSpec(test="x", classes=["a b", "c"]).classes


def test_unseen_tasks_have_test_images_alone() -> None:
    found = define("clip8-unseen2")
    rows = found.document["data"]["tasks"]
    assert [task for task, row in rows.items() if "adapt" not in row] == ["resisc45", "svhn"]
    assert not {"resisc45", "svhn"} & found.document["model"]["experts"].keys()
    assert not {"resisc45", "svhn"} & found.premises.accuracy.keys()
    assert {"resisc45", "svhn"} <= found.premises.images.keys()


def test_corruptions_are_the_hubs_splits_or_computed_here() -> None:
    hub = define("clip4", corruption="spatter").document["data"]["tasks"]["gtsrb"]
    assert (hub["adapt"], hub["test"]) == ("tanganke/gtsrb@train", "tanganke/gtsrb@spatter")
    here = define("clip8", corruption="spatter/3").document["data"]["tasks"]["mnist"]
    assert (here["corruption"], here["test"]) == ("spatter/3", "ylecun/mnist@test")
    with pytest.raises(InputError, match="the hub has no spatter images of sun397.\nCorrupt them here"):
        define("clip8", corruption="spatter")


@pytest.mark.parametrize(
    ("corruption", "adapt_split", "told"),
    [
        ("spatter", "train", "(the hub's own split): test images only; images to adapt on are clean"),
        ("spatter", "test", "(the hub's own split): test images and images to adapt on"),
        ("spatter/3", "train", "(computed here): test images and images to adapt on"),
    ],
)
def test_the_choices_tell_which_images_are_corrupted(
    corruption: str, adapt_split: AdaptSplit, told: str
) -> None:
    found = define("clip4", corruption=corruption, adapt_split=adapt_split)
    assert found.choices[-1] == f"corruption {corruption} {told}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "ViT-B32"}, "Did you mean 'ViT-B-32'"),
        ({"family": "tal"}, "Did you mean 'tall'"),
        ({"experts": {"car": "x"}}, "Did you mean 'cars'"),
        ({"corruption": "spater"}, "Did you mean 'spatter'"),
        ({"family": "tall"}, "the hub has no expert of 'sun397' in open_clip form"),
        ({"family": "tall", "form": "hf"}, "form 'hf' is unknown"),
    ],
)
def test_wrong_names(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        define("clip8", **options)


def test_a_mirror_comes_before_the_hub(tmp_path: Path) -> None:
    (tmp_path / "tanganke" / "dtd").mkdir(parents=True)
    document = define("clip8", mirror=str(tmp_path)).document
    assert document["data"]["tasks"]["dtd"]["test"] == f"{tmp_path}/tanganke/dtd@test"
    assert document["data"]["tasks"]["cars"]["test"] == "tanganke/stanford_cars@test"
    assert document["model"]["base"] == "openai/clip-vit-base-patch32"


def published(name: str, method: str, **key: str) -> ResultRow:
    key = {"backbone": "ViT-B-32", "family": "tanganke", **key}
    [row] = [row for row in published_rows(name, **key) if row.method == method]
    return row


def test_published_rows_are_those_of_one_family() -> None:
    ours = published("clip8", "Task Arithmetic (lambda=0.3)")
    assert (ours.accuracy["sun397"], ours.mean) == (57.1, 68.0)
    assert published("clip8", "Ties-Merging", family="task_arithmetic").mean == 72.4
    assert published("clip20", "TSV-M", family="tall").mean == 77.1
    assert published("clip4", "RegMean", corruption="contrast").accuracy["gtsrb"] > 0
    families = _facts()["families"]
    for name in defined():
        for backbone in _facts()["backbones"]:
            for family in families:
                for row in published_rows(name, backbone, family):
                    assert row.source
                    assert row.mean is not None
                    assert row.details["family"] == family


def test_means_are_as_published_and_normalised_by_the_same_tables_experts() -> None:
    row = published("clip8", "Layer-wise AdaMerging (lambda=0.3)")
    experts = published("clip8", "Fine-tuned (STL)").accuracy
    shares = [100 * value / experts[task] for task, value in row.accuracy.items()]
    assert row.mean == 82.6
    assert row.normalized_mean == pytest.approx(sum(shares) / 8)


@pytest.mark.parametrize("script", sorted((REPOSITORY / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_well_formed_and_pass_arguments_on(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if "adamerge " in script.read_text() and script.name != "environment.sh":
        assert '"$@"' in script.read_text()
