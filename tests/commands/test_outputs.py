"""What merge and fit write is opened by its own library: every format, no missing or unexpected tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pyarrow
import pytest
import timm
import torch
import transformers
import yaml
from conftest import CLASSES, tiny_config, write_clip
from hub_mirror import write_base
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tiny_networks import images, make_hf, texts, tokenizer, write_hf, write_timm
from torch import Tensor

from adamerge.checkpoints import open_checkpoint
from adamerge.cli import main

Merged = dict[str, Tensor]


def by_transformers(auto: str) -> Callable[[Path], Merged]:
    def read(folder: Path) -> Merged:
        model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert not report["mismatched_keys"]
        return model.state_dict()

    return read


def by_open_clip(folder: Path) -> Merged:
    assert open_clip.get_tokenizer(f"local-dir:{folder}")(["a photo"]).shape[0] == 1
    return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).state_dict()


def by_timm(folder: Path) -> Merged:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg))
    return model.state_dict()


def by_sentence_transformers(folder: Path) -> Merged:
    """Read all that modules.json names, as the library does; the library itself where it is installed."""
    for module in json.loads((folder / "modules.json").read_text()):
        assert (folder / module["path"] / "config.json").is_file()
        if module["path"] == "2_Dense":
            assert load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"].shape == (16, 16)
    transformers.AutoTokenizer.from_pretrained(folder)
    return by_transformers("AutoModel")(folder)


def write_sentence_encoder(folder: Path) -> None:
    write_hf(folder, make_hf(texts("Bert"), auto="AutoModel"))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path, settings in {
        "1_Pooling": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True},
        "2_Dense": {"in_features": 16, "out_features": 16, "bias": False},
    }.items():
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(settings))
    save_file({"linear.weight": torch.eye(16)}, folder / "2_Dense" / "model.safetensors")


def write_words(folder: Path, shard: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    transformers.GenerationConfig(max_new_tokens=3).save_pretrained(folder)


def write_vision(folder: Path) -> None:
    write_base(folder / "whole")
    transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "whole").save_pretrained(folder)
    shutil.copy(folder / "whole" / "preprocessor_config.json", folder)


class Kind(NamedTuple):
    write: Callable[[Path], Any]
    read: Callable[[Path], Merged]


CLASSIFIER = "AutoModelForImageClassification"
KINDS = {
    "image classifier": Kind(lambda f: write_hf(f, make_hf(images("ViT"))), by_transformers(CLASSIFIER)),
    "batch norms": Kind(lambda f: write_hf(f, make_hf(images("ResNet"))), by_transformers(CLASSIFIER)),
    "text classifier": Kind(
        lambda f: write_hf(f, make_hf(texts("Roberta"))),
        by_transformers("AutoModelForSequenceClassification"),
    ),
    "CLIP": Kind(write_base, by_transformers("CLIPModel")),
    "CLIP image tower": Kind(write_vision, by_transformers("CLIPVisionModelWithProjection")),
    "sentence encoder": Kind(write_sentence_encoder, by_sentence_transformers),
    "open_clip": Kind(write_clip, by_open_clip),
    "timm": Kind(lambda f: write_timm(f, "resnet"), by_timm),
    "words": Kind(lambda f: write_words(f, "1GB"), by_transformers("AutoModelForCausalLM")),
    "words in shards": Kind(lambda f: write_words(f, "4KB"), by_transformers("AutoModelForCausalLM")),
}
WITH_HEADS = [kind for kind in KINDS if "words" not in kind and kind != "batch norms"]
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{said}.*:adamerge.errors.AdamergeWarning")
    for said in ("not merged", "text tower of its own")
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def write_experts(root: Path) -> list[Path]:
    """Write two experts near a base, as files beside copies of all its small files."""
    base = open_checkpoint(root / "base")
    paths = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        folder = root / f"expert{seed}"
        folder.mkdir()
        for path in (root / "base").glob("*.json"):
            if "index" not in path.name:
                (folder / path.name).write_bytes(path.read_bytes())
        state = {
            n: t + 0.01 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
            for n, t in base.items()
        }
        name = base.files[0].name if len(base.files) == 1 else "model.safetensors"
        save_file({n: t.contiguous() for n, t in state.items()}, folder / name)
        paths.append(folder)
    return paths


def require_merged(found: Merged, out: Path, base: Path) -> None:
    """Check that the library has read the merged values and not the base's."""
    written, before = open_checkpoint(out), open_checkpoint(base)
    changed = [n for n in written if n in found and not torch.equal(written[n], before[n])]
    assert changed
    assert all(torch.equal(found[name], written[name]) for name in changed)


def test_merge(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    KINDS[kind].write(tmp_path / "base")
    (tmp_path / "base" / "tf_model.h5").touch()
    (tmp_path / "base" / "training_args.bin").touch()
    experts = [f"--experts={path.name}={path}" for path in write_experts(tmp_path)]
    given = ["--base", str(tmp_path / "base"), *experts, "--out", str(tmp_path / "out")]
    assert main(["merge", "average", *given]) == 0
    require_merged(KINDS[kind].read(tmp_path / "out"), tmp_path / "out", tmp_path / "base")
    lost = {path.name for path in (tmp_path / "base").iterdir()} - {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert lost <= {"tf_model.h5", "training_args.bin", "whole"}


@pytest.mark.parametrize("kind", WITH_HEADS)
def test_fit(kind: str, tmp_path: Path, pictures: Path) -> None:
    torch.manual_seed(0)
    KINDS[kind].write(tmp_path / "base")
    if kind == "sentence encoder":  # a run knows no dense layer after the pooling
        modules = json.loads((tmp_path / "base" / "modules.json").read_text())[:2]
        (tmp_path / "base" / "modules.json").write_text(json.dumps(modules))
    paths = write_experts(tmp_path)
    file = tmp_path / "texts.parquet"
    parquet.write_table(
        pyarrow.table({"text": ["a good b", "bad", "c d", "red"], "label": [0, 1, 2, 0]}), file
    )
    is_text = kind in ("text classifier", "sentence encoder")
    source = str(file if is_text else pictures / "bars" / "adapt")
    task: dict[str, Any] = {"adapt": source}
    if kind in ("CLIP", "open_clip"):
        task["classes"] = CLASSES["bars"]
    if kind in ("CLIP image tower", "sentence encoder"):
        width = KINDS[kind].read(tmp_path / "base")
        size = width["visual_projection.weight"].shape[0] if kind == "CLIP image tower" else 16
        save_file({"weight": torch.randn(3, size)}, tmp_path / "head.safetensors")
        task["head"] = str(tmp_path / "head.safetensors")
    document = {
        "model": {"base": str(tmp_path / "base"), "experts": {path.name: str(path) for path in paths}},
        "data": {"batch_size": 2, "holdout": 0.0, "tasks": {path.name: dict(task) for path in paths}},
        "trainer": {"max_steps": 1},
    }
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(document))
    given = ["--run_dir", str(tmp_path / "run"), "--evaluate_experts", "false"]
    assert main(["fit", "--config", str(tmp_path / "b.yaml"), *given]) == 0
    merged = tmp_path / "run" / "merged"
    require_merged(KINDS[kind].read(merged), merged, tmp_path / "base")


def test_a_sentence_encoder_is_opened_by_its_own_library(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    write_sentence_encoder(tmp_path / "base")
    experts = [f"--experts={path.name}={path}" for path in write_experts(tmp_path)]
    given = ["--base", str(tmp_path / "base"), *experts, "--out", str(tmp_path / "out")]
    assert main(["merge", "average", *given]) == 0
    assert library.SentenceTransformer(str(tmp_path / "out")).encode(["good"]).shape == (1, 16)


def test_bare_open_clip_weights_and_plain_files(tmp_path: Path) -> None:
    (tmp_path / "architectures").mkdir()
    config = tiny_config()["model_cfg"]
    (tmp_path / "architectures" / "tiny-of-outputs.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "architectures")
    write_clip(tmp_path / "base")
    weights = tmp_path / "base" / "open_clip_model.safetensors"
    experts = [f"--experts={path.name}={path / weights.name}" for path in write_experts(tmp_path)]
    base = f"open_clip:tiny-of-outputs={weights}"
    assert main(["merge", "average", "--base", base, *experts, "--out", str(tmp_path / "out")]) == 0
    require_merged(by_open_clip(tmp_path / "out"), tmp_path / "out", tmp_path / "base")
    out = tmp_path / "out.safetensors"
    assert main(["merge", "average", "--base", str(weights), *experts, "--out", str(out)]) == 0
    model = open_clip.create_model("tiny-of-outputs", pretrained=str(out))
    require_merged(model.state_dict(), out, weights)
