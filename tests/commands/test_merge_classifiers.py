"""`adamerge merge` of classifiers: rows that mean different things stay apart, and none is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_networks import images, make_hf, texts, write_hf, write_timm
from torch import Tensor
from torch.testing import assert_close

import adamerge
from adamerge.cli import main
from adamerge.errors import AdamergeWarning, InputError
from adamerge.inspection import inspect
from adamerge.vectors import TaskVectors

peft = pytest.importorskip("peft")
NAMES = {"a": ["negative", "positive"], "b": ["spam", "ham"], "three": ["red", "green", "blue"]}


def write(folder: Path, config: Any, names: list[str] | None, seed: int, auto: str | None = None) -> Path:
    """Write a classifier near the others of its configuration, with a last layer of its own."""
    shared = {n: t for n, t in make_hf(config, 2, auto=auto).state_dict().items() if "classifier" not in n}
    model = make_hf(config, len(names or "ab"), auto=auto)
    model.load_state_dict(shared, strict=False)
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: row for row, name in enumerate(names)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    write_hf(folder, model)
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and experts of tiny BERT classifiers."""
    root = tmp_path_factory.mktemp("classifiers")
    write(root / "base", texts("Bert"), None, 0)
    for seed, (name, classes) in enumerate(NAMES.items(), 1):
        write(root / name, texts("Bert"), classes, seed)
    return root


def merge(out: Path, base: Path, *experts: Path, more: tuple[str, ...] = ()) -> dict[str, Tensor]:
    given = [f"--experts={path.name}={path}" for path in experts]
    assert main(["merge", "average", "--base", str(base), *given, "--out", str(out), *more]) == 0
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("experts", [("a", "b"), ("a", "three"), ("three",)])
def test_rows_of_other_classes_stay_the_bases(zoo: Path, tmp_path: Path, experts: tuple[str, ...]) -> None:
    with pytest.warns(AdamergeWarning, match=r"classifier.weight.*not merged.*merge_classifier"):
        merged = merge(tmp_path / "out", zoo / "base", *(zoo / name for name in experts))
    base = load_file(zoo / "base" / "model.safetensors")
    states = [load_file(zoo / name / "model.safetensors") for name in experts]
    for name, tensor in merged.items():
        mean = (
            torch.stack([state[name] for state in states]).mean(0) if "classifier" not in name else base[name]
        )
        assert_close(tensor, mean, rtol=0, atol=1e-6)
    assert "not merged" in (tmp_path / "out" / "README.md").read_text()


def test_the_experts_own_classifiers_lie_beside_the_weights(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.warns(AdamergeWarning):
        merge(out, zoo / "base", zoo / "a", zoo / "three")
    found = adamerge.load(out)
    for name in ("a", "three"):
        state = load_file(zoo / name / "model.safetensors")
        assert torch.equal(found.heads[name].weight, state["classifier.weight"])
        assert torch.equal(found.heads[name].bias, state["classifier.bias"])
        assert found.predict(["good a", "bad"], task=name).class_name[0] in NAMES[name]
    assert found.classes == {name: NAMES[name] for name in ("a", "three")}
    assert "heads.safetensors" in (out / "README.md").read_text()


def test_equal_classes_are_merged_and_are_the_folders_head(zoo: Path, tmp_path: Path) -> None:
    folders = [write(tmp_path / name, texts("Bert"), NAMES["a"], 7 + i) for i, name in enumerate("xyz")]
    merged = merge(tmp_path / "out", *folders)
    a, b = (load_file(folder / "model.safetensors")["classifier.weight"] for folder in folders[1:])
    assert_close(merged["classifier.weight"], (a + b) / 2)
    found = adamerge.load(tmp_path / "out")
    assert torch.equal(found.heads["merged"].weight, merged["classifier.weight"])
    assert found.classes == {"merged": NAMES["a"]}
    assert "are merged" in (tmp_path / "out" / "README.md").read_text()


def test_a_word_of_consent_merges_rows_without_names(zoo: Path, tmp_path: Path) -> None:
    merged = merge(tmp_path / "out", zoo / "base", zoo / "a", zoo / "b", more=("--merge_classifier", "true"))
    a, b = (load_file(zoo / name / "model.safetensors")["classifier.weight"] for name in "ab")
    assert_close(merged["classifier.weight"], (a + b) / 2)


def test_python_stream_and_excluded_rows(zoo: Path) -> None:
    experts = {name: zoo / name for name in ("a", "b")}
    with pytest.warns(AdamergeWarning, match="no classes are named by the base"):
        vectors = TaskVectors.open(zoo / "base", experts)
    assert not [name for name in vectors.names if "classifier" in name]
    assert vectors.layers.kept == ("classifier.weight", "classifier.bias")
    quiet = TaskVectors.open(zoo / "base", experts, exclude=["classifier.*"])
    assert quiet.names == vectors.names
    assert "classifier.bias" in TaskVectors.open(zoo / "base", experts, merge_classifier=True).names


@pytest.mark.parametrize("kind", ["tokens", "regression", "images", "timm"])
def test_other_kinds_of_rows(tmp_path: Path, kind: str) -> None:
    """Token labels, scores, timm's heads: none is averaged where names are missing or differ."""
    for seed, name in enumerate(("base", "x", "y")):
        labels = [f"{name}{row}" for row in range(2)]
        if kind == "timm":
            write_timm(tmp_path / name, "vit", 2, seed)
        elif kind == "images":
            write(tmp_path / name, images("ViT"), labels, seed)
        else:
            auto = "AutoModelForTokenClassification" if kind == "tokens" else None
            write(tmp_path / name, texts("Bert"), labels if auto else [f"LABEL_{0}"], seed, auto)
    more = ("--force", "true") if kind == "timm" else ()
    with pytest.warns(AdamergeWarning, match="not merged"):
        merged = merge(tmp_path / "out", *(tmp_path / name for name in ("base", "x", "y")), more=more)
    base = load_file(tmp_path / "base" / "model.safetensors")
    rows = [name for name in merged if name.startswith(("classifier", "head."))]
    assert len(rows) == 2
    assert all(torch.equal(merged[name], base[name]) for name in rows)
    assert (tmp_path / "out" / "heads.safetensors").exists() == (kind != "tokens")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_lora_adapter_with_a_classifier_of_another_shape(zoo: Path, tmp_path: Path) -> None:
    import transformers

    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(zoo / "base", num_labels=4, ignore_mismatched_sizes=True)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    with pytest.warns(AdamergeWarning, match="not merged"):
        merged = merge(tmp_path / "out", zoo / "base", zoo / "a", tmp_path / "lora")
    assert merged["classifier.weight"].shape == (2, 16)
    assert adamerge.load(tmp_path / "out").heads["lora"].weight.shape == (4, 16)


def test_inspect_tells_what_a_merge_would_do(zoo: Path) -> None:
    experts = {name: zoo / name for name in ("a", "three")}
    report = inspect(zoo / "base", experts, rank=False)
    assert not report.problems
    assert any("not merged" in note and "classifier.weight" in note for note in report.notes)
    assert {row.tensor for row in report.kept} >= {"classifier.weight", "classifier.bias"}


def test_contradicting_labels_are_refused_by_merge_and_told_by_inspect(zoo: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", texts("Bert"), NAMES["a"], 1)
    config = json.loads((folder / "config.json").read_text())
    config["label2id"] = {"negative": 1, "positive": 0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="contradict"):
        TaskVectors.open(zoo / "base", {"x": folder})
    assert any("contradict" in problem for problem in inspect(zoo / "base", {"x": folder}).problems)


def test_compress_leaves_the_classifier_of_other_classes_out(zoo: Path, tmp_path: Path) -> None:
    given = ["--base", str(zoo / "base"), "--expert", str(zoo / "three"), "--out", str(tmp_path / "x.st")]
    with pytest.warns(AdamergeWarning, match="not merged"):
        assert main(["compress", *given]) == 0
    back = ["--base", str(zoo / "base"), "--file", str(tmp_path / "x.st"), "--out", str(tmp_path / "back")]
    assert main(["decompress", *back]) == 0
    base = load_file(zoo / "base" / "model.safetensors")
    assert torch.equal(
        load_file(tmp_path / "back" / "model.safetensors")["classifier.weight"], base["classifier.weight"]
    )


def test_token_classifiers_are_no_heads_of_a_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", texts("Bert"), NAMES["a"], 1, "AutoModelForTokenClassification")
    base = write(tmp_path / "base", texts("Bert"), None, 0)
    with pytest.raises(InputError, match="classifies parts of inputs"):
        adamerge.models.open_heads(base, {"x": adamerge.TaskSpec("memory")}, {"x": folder})


def test_the_closing_line_loads_the_experts_classifiers(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(AdamergeWarning, match="not merged"):
        merge(tmp_path / "out", zoo / "base", zoo / "a")
    told = capsys.readouterr().err
    assert f"adamerge.load({str(tmp_path / 'out')!r})" in told
    assert f"adamerge export {tmp_path / 'out'} --task NAME" in told


def test_rows_of_which_several_may_be_right_are_no_head(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "tags", texts("Bert"), ["funny", "sad"], 7)
    config = json.loads((tmp_path / "tags" / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (tmp_path / "tags" / "config.json").write_text(json.dumps(config))
    with pytest.warns(AdamergeWarning, match="not merged"):
        merge(tmp_path / "out", zoo / "base", tmp_path / "tags")
    assert "multi_label_classification" in capsys.readouterr().err
    assert not (tmp_path / "out" / "heads.safetensors").exists()
    (tmp_path / "texts.txt").write_text("a\nb\n")
    rows = {"tags": {"adapt": str(tmp_path / "texts.txt")}}
    model = {"base": str(zoo / "base"), "experts": {"tags": str(tmp_path / "tags")}}
    (tmp_path / "b.yaml").write_text(json.dumps({"model": model, "data": {"tasks": rows}}))
    assert main(["fit", "--config", str(tmp_path / "b.yaml"), "--run_dir", str(tmp_path / "run")]) == 2
    assert "several or none may be right" in capsys.readouterr().err
