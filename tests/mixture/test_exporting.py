"""An exported classifier computes in its own library what the merged model computes here."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from conftest import draw
from safetensors.torch import load_file, save_file
from tiny_networks import images, make_hf, texts, write_hf, write_timm
from tokenizers import processors
from torch.testing import assert_close

import adamerge
from adamerge.cli import main
from adamerge.errors import AdamergeWarning, InputError
from adamerge.mixture import export_classifier, write_companions
from adamerge.models.heads import Head, Residual

CLASSES = {"mood": ["bad", "good"], "colour": ["red", "blue", "good"]}
KINDS = {
    "Bert": (lambda: texts("Bert"), None),
    "Roberta without its own layers": (lambda: texts("Roberta"), "AutoModel"),
    "DistilBert": (lambda: texts("DistilBert"), None),
    "words": (lambda: texts("Bert"), "AutoModelForMaskedLM"),
    "ViT": (lambda: images("ViT"), None),
    "ResNet": (lambda: images("ResNet"), None),
}
INPUTS = {
    "text": ["a good b", "bad", "c red d blue"],
    "image": [draw(i, i).resize((20, 30)) for i in range(3)],
}


def named(model: Any, names: list[str]) -> Any:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: row for row, name in enumerate(names)}
    return model


def merged(root: Path, kind: str) -> Path:
    """Merge two classifiers on one base, whatever the base has of the classifier."""
    config, auto = KINDS[kind]
    if auto == "AutoModel":
        write_hf(root / "base", make_hf(config(), auto=auto))
    else:
        write_hf(root / "base", make_hf(config(), 4, auto=auto))
    for seed, (task, names) in enumerate(CLASSES.items(), 1):
        write_hf(root / task, named(make_hf(config(), len(names), seed), names))
    experts = [f"--experts={task}={root / task}" for task in CLASSES]
    more = ["--force", "true", "--out", str(root / "out")]
    more += ["--allow_missing", "cls.*", "--exclude", "bert.pooler*"] * (kind == "words")  # as it is advised
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdamergeWarning)  # that last layers stay apart
        assert main(["merge", "average", "--base", str(root / "base"), *experts, *more]) == 0
    return root / "out"


def pipeline_of(folder: Path, modality: str) -> Any:
    task = "text-classification" if modality == "text" else "image-classification"
    return transformers.pipeline(task, str(folder), device="cpu")


def logits(folder: Path, values: list[Any]) -> torch.Tensor:
    """Compute as the library's users do."""
    auto = (
        "AutoModelForSequenceClassification"
        if isinstance(values[0], str)
        else "AutoModelForImageClassification"
    )
    model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    if isinstance(values[0], str):
        batch = transformers.AutoTokenizer.from_pretrained(folder)(values, return_tensors="pt", padding=True)
    else:
        batch = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(
            values, return_tensors="pt"
        )
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("kind", KINDS)
def test_exported_logits_are_the_merged_models(kind: str, tmp_path: Path) -> None:
    model = merged(tmp_path, kind)
    ours = adamerge.load(model)
    values = INPUTS[ours.backbone.modality]
    for task, names in CLASSES.items():
        folder = tmp_path / f"plain-{task}"
        assert main(["export", str(model), "--task", task, "--out", str(folder)]) == 0
        expected = ours.logits(ours.batch(values), task)
        assert_close(logits(folder, values), expected, atol=1e-5, rtol=1e-5)
        config = transformers.AutoConfig.from_pretrained(folder)
        assert config.id2label == dict(enumerate(names))
        assert config.label2id == {name: row for row, name in enumerate(names)}
        assert json.loads((folder / "config.json").read_text())["num_labels"] == len(names)


@pytest.mark.parametrize("kind", ["Bert", "ViT"])
def test_the_librarys_pipeline_uses_it_as_it_is(kind: str, tmp_path: Path) -> None:
    model = merged(tmp_path, kind)
    ours = adamerge.load(model)
    values = INPUTS[ours.backbone.modality]
    for task in (*CLASSES, "all"):
        export_classifier(model, tmp_path / task / "plain", task)
        found = ours.predict(values, None if task == "all" else task)
        answers = pipeline_of(tmp_path / task / "plain", ours.backbone.modality)(values, top_k=1)
        shown = [name.rpartition(": ")[2] for name in (answer[0]["label"] for answer in answers)]
        assert shown == found.class_name
        scores = torch.tensor([answer[0]["score"] for answer in answers])
        tolerance = 1e-4 if kind == "Bert" else 0.02  # the pipeline resizes by torchvision, not by PIL
        assert_close(scores, found.probability, atol=tolerance, rtol=tolerance)


def test_all_tasks_together_name_colliding_classes_by_task(tmp_path: Path) -> None:
    model = merged(tmp_path, "ViT")
    export_classifier(model, tmp_path / "plain", "all")
    names = transformers.AutoConfig.from_pretrained(tmp_path / "plain").id2label
    assert [*names.values()] == ["bad", "mood: good", "red", "blue", "colour: good"]
    document = json.loads((model / "adamerge.json").read_text())
    document["classes"]["mood"] = []
    (model / "adamerge.json").write_text(json.dumps(document))
    export_classifier(model, tmp_path / "plain", "all", overwrite=True)
    names = transformers.AutoConfig.from_pretrained(tmp_path / "plain").id2label
    assert [*names.values()] == ["mood: 0", "mood: 1", "red", "blue", "good"]


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_timm_reads_its_own(kind: str, tmp_path: Path) -> None:
    for seed, (name, count) in enumerate({"base": 4, "mood": 2, "colour": 3}.items()):
        write_timm(tmp_path / name, kind, count, seed)
    experts = [f"--experts={task}={tmp_path / task}" for task in CLASSES]
    more = ["--force", "true", "--out", str(tmp_path / "out")]
    with pytest.warns(AdamergeWarning):
        assert main(["merge", "average", "--base", str(tmp_path / "base"), *experts, *more]) == 0
    ours = adamerge.load(tmp_path / "out")
    batch = ours.batch(INPUTS["image"])
    for task, count in {"mood": 2, "colour": 3, "all": 5}.items():
        export_classifier(tmp_path / "out", tmp_path / f"plain-{task}", task)
        model = timm.create_model(f"local-dir:{tmp_path / f'plain-{task}'}", pretrained=True).eval()
        assert model.num_classes == count
        tasks = CLASSES if task == "all" else [task]
        expected = torch.cat([ours.logits(batch, name) for name in tasks], -1)
        with torch.no_grad():
            assert_close(model(ours.backbone.normalised(batch)), expected, atol=1e-5, rtol=1e-5)
    settings = json.loads((tmp_path / "plain-all" / "config.json").read_text())
    assert settings["label_names"] == ["mood: 0", "mood: 1", "colour: 0", "colour: 1", "colour: 2"]


def test_a_run_on_a_sentence_encoder_becomes_a_plain_classifier(tmp_path: Path) -> None:
    write_hf(tmp_path / "base", make_hf(texts("Bert"), auto="AutoModel"))
    parts = {"": "Transformer", "1_Pooling": "Pooling"}
    kinds = [{"path": p, "type": f"sentence_transformers.models.{kind}"} for p, kind in parts.items()]
    (tmp_path / "base" / "modules.json").write_text(json.dumps(kinds))
    (tmp_path / "base" / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (tmp_path / "base" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in INPUTS["text"]))
    for seed, (task, names) in enumerate(CLASSES.items(), 1):
        write_hf(tmp_path / task, named(make_hf(texts("Bert"), len(names), seed), names))
    tasks = {task: {"adapt": str(tmp_path / "texts.jsonl")} for task in CLASSES}
    model = {
        "base": str(tmp_path / "base"),
        "experts": {t: str(tmp_path / t) for t in CLASSES},
        "force": True,
    }
    document = {"model": model, "data": {"batch_size": 2, "holdout": 0.0, "tasks": tasks}}
    (tmp_path / "b.yaml").write_text(json.dumps(document | {"trainer": {"max_steps": 1}}))
    more = ["--run_dir", str(tmp_path / "run"), "--evaluate_experts", "false"]
    assert main(["fit", "--config", str(tmp_path / "b.yaml"), *more]) == 0
    assert main(["export", str(tmp_path / "run"), "--task", "colour", "--out", str(tmp_path / "plain")]) == 0
    ours = adamerge.load(tmp_path / "run" / "merged")
    expected = ours.logits(ours.batch(INPUTS["text"]), "colour")
    assert_close(logits(tmp_path / "plain", INPUTS["text"]), expected, atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "plain" / "modules.json").exists()
    assert not (tmp_path / "plain" / "1_Pooling").exists()
    assert [*transformers.AutoConfig.from_pretrained(tmp_path / "plain").id2label.values()] == CLASSES[
        "colour"
    ]


def test_a_decoder_without_padding_is_exported_with_the_token_that_it_was_read_with(tmp_path: Path) -> None:
    sizes = {"vocab_size": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24, "eos_token_id": 3}
    config = transformers.GPT2Config(**sizes)
    for seed, (name, names) in enumerate({"base": ["x", "y"], **CLASSES}.items()):
        write_hf(tmp_path / name, named(make_hf(config, len(names), seed), names))
        words = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        words.pad_token, words.eos_token = None, "[SEP]"
        words.backend_tokenizer.post_processor = processors.TemplateProcessing("$A")
        words.save_pretrained(tmp_path / name)
    experts = [f"--experts={task}={tmp_path / task}" for task in CLASSES]
    more = ["--force", "true", "--out", str(tmp_path / "out")]
    with pytest.warns(AdamergeWarning):
        assert main(["merge", "average", "--base", str(tmp_path / "base"), *experts, *more]) == 0
    export_classifier(tmp_path / "out", tmp_path / "plain", "mood")
    ours = adamerge.load(tmp_path / "out")
    values = INPUTS["text"]
    expected = ours.logits(ours.batch(values), "mood")
    assert_close(logits(tmp_path / "plain", values), expected, atol=1e-5, rtol=1e-5)  # padded to one length
    answers = pipeline_of(tmp_path / "plain", "text")(values, batch_size=3)
    assert [answer["label"] for answer in answers] == ours.predict(values, "mood").class_name


class TestRefusals:
    def test_tasks(self, tmp_path: Path) -> None:
        model = merged(tmp_path, "Roberta without its own layers")
        with pytest.raises(InputError, match="2 tasks: mood, colour"):
            export_classifier(model, tmp_path / "plain")
        with pytest.raises(InputError, match="'moods'.*\n.*mood"):
            export_classifier(model, tmp_path / "plain", "moods")
        with pytest.raises(InputError, match="layers of its own"):
            export_classifier(model, tmp_path / "plain", "all")
        with pytest.raises(InputError, match="would replace the model"):
            export_classifier(model, model, "mood", overwrite=True)
        assert main(["export", str(model), "--task", "mood"]) == 2
        assert not (tmp_path / "plain").exists()

    def test_corrected_features(self, tmp_path: Path) -> None:
        model = merged(tmp_path, "ViT")
        head = Head(torch.ones(2, 16), None, False, residual=Residual(torch.ones(1, 16), torch.ones(16, 1)))
        write_companions(model, {"mood": head}, {"mood": CLASSES["mood"]})
        with pytest.raises(InputError, match="Surgery"):
            export_classifier(model, tmp_path / "plain")

    def test_damaged_folders(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = merged(tmp_path, "ViT")
        document = json.loads((model / "adamerge.json").read_text())
        (model / "adamerge.json").write_text('{"a":' * 60_000)
        arguments = ["export", str(model), "--task", "mood", "--out", str(tmp_path / "plain")]
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.strip().splitlines()[-2:]) == 2
        (model / "adamerge.json").write_text(json.dumps({**document, "files": {}}))
        state = load_file(model / "model.safetensors")
        name = next(name for name in state if name.endswith("layernorm_after.weight"))
        state[name][0] = torch.nan
        save_file(state, model / "model.safetensors")
        assert main(arguments) == 4
        assert "not finite" in capsys.readouterr().err
        assert not (tmp_path / "plain").exists()

    def test_zero_shot_heads_and_routed_models(self, clip: Path, tmp_path: Path) -> None:
        from builders import make_task

        from adamerge import Router, save_mixture
        from adamerge.checkpoints import save
        from adamerge.mixture import Mixture
        from adamerge.vectors import rebase

        task = make_task(clip)
        save(
            task.vectors.base_state(),
            tmp_path / "static",
            like=clip / "base",
            companions=lambda folder: write_companions(folder, task.heads, {}),
        )
        with pytest.raises(InputError, match="CLIP or of a sentence encoder"):
            export_classifier(tmp_path / "static", tmp_path / "plain", "bars")
        shared = task.vectors.merge(task.vectors.uniform(0.3))
        mixture = Mixture(
            rebase(task.vectors, shared, "low_rank"), task.backbone, task.heads, Router("linear")
        )
        save_mixture(mixture, tmp_path / "routed", like=clip / "base")
        with pytest.raises(InputError, match="weights of its own"):
            export_classifier(tmp_path / "routed", tmp_path / "plain", "bars")
