"""Texts in the commands: a masked language model, a classifier and a LoRA, and new sentences in files."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from pyarrow import parquet
from tiny_networks import make_hf, texts, tokenizer, write_hf
from torch.testing import assert_close

from adamerge import load
from adamerge.cli import main
from adamerge.errors import AdamergeWarning

SENTENCES = ["a good b", "bad", "red blue a b", "blue a", "good good red"]
LONG = "c red d blue " * 12
COUNTS = {"mood": 2, "colour": 3}
CUT = "ignore:.* texts (is|are) cut at 23 tokens:adamerge.errors.AdamergeWarning"
DEPRECATED = "ignore:`is_gradient_checkpointing` is deprecated"


def trained(base: Any, n_classes: int, seed: int) -> Any:
    """A classifier of the base's encoder, moved a little."""
    model = make_hf(texts("Roberta"), n_classes=n_classes, seed=seed)
    model.roberta.load_state_dict(base.roberta.state_dict(), strict=False)
    model.config.id2label = {i: f"class{i}" for i in range(n_classes)}
    model.config.label2id = {f"class{i}": i for i in range(n_classes)}
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts, their texts, and a benchmark's file."""
    root = tmp_path_factory.mktemp("texts")
    base = make_hf(texts("Roberta"), auto="AutoModelForMaskedLM")
    write_hf(root / "base", base)
    whole = trained(base, COUNTS["mood"], 1)
    with torch.no_grad():
        whole.roberta.embeddings.word_embeddings.weight.add_(0.05)
    write_hf(root / "mood", whole)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    lora = peft.get_peft_model(trained(base, COUNTS["colour"], 2), config)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    lora.save_pretrained(root / "colour")
    for task, count in COUNTS.items():
        lines = [f"{text},{i % count}" for i, text in enumerate([*SENTENCES, LONG.strip()] * 2)]
        (root / f"{task}.csv").write_text("\n".join(["text,label", *lines]))
    rows = {task: {"adapt": str(root / f"{task}.csv"), "test": str(root / f"{task}.csv")} for task in COUNTS}
    document = {
        "model": {"base": str(root / "base"), "experts": {t: str(root / t) for t in COUNTS}, "force": True},
        "data": {"batch_size": 4, "tasks": rows},
    }
    (root / "texts.yaml").write_text(yaml.safe_dump(document))
    return root


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    arguments = ["--config", str(world / "texts.yaml"), "--run_dir", str(world / "run")]
    assert main(["fit", *arguments, "--trainer.max_steps", "2", "--data.max_length", "23"]) == 0
    return world / "run"


def predict(run: Path, data: Path, *more: str) -> int:
    out = data.with_suffix(".parquet")
    return main(["predict", "--model", str(run / "merged"), "--data", str(data), "--out", str(out), *more])


pytestmark = [pytest.mark.filterwarnings(CUT), pytest.mark.filterwarnings(DEPRECATED)]


def test_new_sentences_are_predicted_from_a_text_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.txt").write_text("\n".join(SENTENCES) + "\n")
    assert predict(run, tmp_path / "new.txt", "--task", "mood", "--batch_size", "2") == 0
    found = parquet.read_table(tmp_path / "new.parquet").to_pydict()
    assert found["text"] == SENTENCES
    assert "path" not in found
    mixture = load(run / "merged")
    expected = mixture.predict(SENTENCES, "mood")
    assert found["class"] == expected.label.tolist()
    assert_close(torch.tensor(found["probability"]), expected.probability, atol=1e-5, rtol=1e-5)
    assert found["class_name"] == [f"class{label}" for label in found["class"]]
    assert "predictions of 5 texts." in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_of_texts_are_predicted(run: Path, tmp_path: Path, suffix: str) -> None:
    import pyarrow

    file, out = tmp_path / f"new.{suffix}", tmp_path / "out.parquet"
    if suffix == "csv":
        file.write_text("id,review\n" + "\n".join(f"{i},{text}" for i, text in enumerate(SENTENCES)))
    elif suffix == "jsonl":
        file.write_text("\n".join(json.dumps({"review": text}) for text in SENTENCES))
    else:
        parquet.write_table(pyarrow.table({"review": SENTENCES}), file)
    arguments = ["predict", "--model", str(run / "merged"), "--data", str(file), "--out", str(out)]
    assert main([*arguments, "--columns", "[review]"]) == 0
    assert parquet.read_table(out)["text"].to_pylist() == SENTENCES
    assert main([*arguments, "--overwrite", "true"]) == 3


def test_pairs_have_two_columns(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("premise,hypothesis\na good,bad\nred,\n")
    assert predict(run, tmp_path / "new.csv") == 0
    found = parquet.read_table(tmp_path / "new.parquet").to_pydict()
    assert (found["text"], found["text_pair"]) == (["a good", "red"], ["bad", ""])


def test_what_is_no_text_has_a_row_all_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ['{"text": "a"}', '{"text": 7}', '{"text": null}', '{"text": "\\ud800"}', '{"text": " "}']
    (tmp_path / "new.jsonl").write_text("\n".join(rows))
    assert predict(run, tmp_path / "new.jsonl") == 3
    message = "4 of 5 texts cannot be read: row 1 (int, no text), row 2 (no text), row 3 (half a character)"
    assert message in capsys.readouterr().err
    found = parquet.read_table(tmp_path / "new.parquet").to_pydict()
    assert [label is None for label in found["class"]] == [False, True, True, True, True]
    assert found["problem"][4] == "an empty text"


def test_empty_lines_alone_are_no_failure(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("a\n\nb\n")
    with pytest.warns(AdamergeWarning, match="1 of 3 texts cannot be read: row 1 .an empty text"):
        assert predict(run, tmp_path / "new.txt") == 0


def test_cut_texts_are_counted_and_a_length_is_checked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.txt").write_text(f"a\n{LONG}\n")
    with pytest.warns(
        AdamergeWarning, match=r"--data: 1 of 2 texts is cut at 9 tokens .*; --max_length sets"
    ):
        assert predict(run, tmp_path / "new.txt", "--max_length", "9") == 0
    assert predict(run, tmp_path / "new.txt", "--max_length", "99", "--overwrite", "true") == 2
    assert "max_length=99: this model reads 3 to 23 tokens of a text." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("new.txt", "né".encode("latin-1"), "line 1 is no UTF-8"),
        ("new.csv", b"a,b\n1,2\n", "columns ['a', 'b'], and none named 'text'"),
        ("new.csv", b"text,sentence\na,b\n", "could be read by its columns text or sentence"),
        ("new.jsonl", b"{", "line 1 is no JSON object"),
        ("new.txt", b"", "new.txt holds no texts"),
    ],
)
def test_files_that_cannot_be_read_are_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert predict(run, tmp_path / name) == 3
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured
    assert not (tmp_path / "new.parquet").exists()


def test_messages_of_a_run_speak_of_texts(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(world / "texts.yaml"), "--run_dir", str(tmp_path / "run")]
    (tmp_path / "few.csv").write_text("text\n\na\n")
    more = ["--data.tasks.mood.adapt", str(tmp_path / "few.csv"), "--trainer.max_steps", "1"]
    with pytest.warns(AdamergeWarning) as warned:
        assert main(["fit", *arguments, *more]) == 0
    told = [str(warning.message) for warning in warned]
    assert any("task 'colour', test texts: 2 of 12 texts are cut at 23 tokens" in line for line in told)
    assert any("task 'mood' has 1 adaptation texts, fewer than a batch" in line for line in told)
    assert main(["fit", *arguments, "--overwrite", "true", "--data.max_length", "64"]) == 2
    assert "max_length=64: this model reads 3 to 23 tokens of a text." in capsys.readouterr().err


def test_data_check_counts_what_the_model_cuts(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "--benchmark", str(world / "texts.yaml")]) == 0
    assert "mood, test: 2 of 12 texts are cut at 23 tokens (the longest has 50)" in capsys.readouterr().out


def test_static_rows_of_texts_are_the_experts_own(world: Path, tmp_path: Path) -> None:
    arguments = [str(world / "texts.yaml"), "--methods", "individual", "--out", str(tmp_path / "bench")]
    assert main(["bench", "run", *arguments]) == 0
    tokens = tokenizer()
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(world / "mood").eval()
    right = 0
    for i, text in enumerate([*SENTENCES, LONG.strip()] * 2):
        with torch.no_grad():
            logits = model(**tokens(text, return_tensors="pt", truncation=True, max_length=23)).logits
        right += int(logits.argmax()) == i % 2
    [row] = json.loads((tmp_path / "bench" / "results.json").read_text())["rows"]
    assert row["accuracy"]["mood"] == pytest.approx(100 * right / 12)


def test_static_merges_and_reports_leave_own_layers_out(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ["--base", str(world / "base")]
    for task in COUNTS:
        sources += ["--experts", f"{task}={world / task}"]
    out = tmp_path / "merged"
    assert main(["merge", "task_arithmetic", *sources, "--out", str(out), "--force", "true"]) == 0
    assert (
        "own layers are not merged, the base has none of them: classifier.out_proj" in capsys.readouterr().err
    )
    import transformers

    merged = transformers.AutoModelForMaskedLM.from_pretrained(out).state_dict()
    base = transformers.AutoModelForMaskedLM.from_pretrained(world / "base").state_dict()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert any("attention.self.query" in name for name in changed)
    assert not any(name.startswith("lm_head.dense") for name in changed)
    mixture = load(out)
    assert {task: len(head.weight) for task, head in mixture.heads.items()} == COUNTS
    assert all(head.layers is not None for head in mixture.heads.values())
    assert main(["inspect", *sources]) == 0
    assert "A merge would be refused" not in capsys.readouterr().out
