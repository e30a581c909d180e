"""Writes a small mirror of the hub: `python tests/hub_mirror.py OUT`.

Below OUT lie, under the ids and in the formats of the real ones, a CLIP base with its processor and tokenizer
(`openai/clip-vit-base-patch32`), eight experts (`tanganke/clip-vit-base-patch32_TASK`) and the parquet files
of the eight data sets; the same base and experts in open_clip's format (`timm/...`, `local/tanganke/...`);
and the experts as PEFT LoRA folders (`lora/TASK`). All are tiny and random. Labels are what each expert
predicts, as transformers computes it, but for every eighth: every expert reaches 87.5 %, and no other does.
`expect-NAME.yaml` states what a benchmark's premises are there:
`adamerge bench run clip8 --mirror OUT --expect OUT/expect-clip8.yaml`.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, disable_progress_bars
from datasets import Image as ImageFeature
from open_clip.tokenizer import SimpleTokenizer
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModel

import adamerge
from adamerge.benchmarks import define

TASKS_FILE = Path(adamerge.__file__).parent / "benchmarks" / "tasks.yaml"
TASKS = ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
CORRUPTED = "gaussian_noise"
SIZE, WIDTH, LAYERS, CONTEXT = 32, 32, 2, 40
N_TEST, N_TRAIN, WRONG = 16, 20, 2
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
BASE = "openai/clip-vit-base-patch32"
OPEN_CLIP_BASE = "timm/vit_base_patch32_clip_224.openai"


@cache
def facts() -> dict[str, Any]:
    """What the package knows of every task."""
    return yaml.safe_load(TASKS_FILE.read_text(encoding="utf-8"))


def expert_id(task: str) -> str:
    """The hub id of a task's expert."""
    return f"tanganke/clip-vit-base-patch32_{facts()[task]['expert']}"


def write_mirror(out: Path) -> None:
    """Write everything."""
    disable_progress_bars()
    base = write_base(out / BASE)
    write_open_clip(out / OPEN_CLIP_BASE, base.state_dict())
    for number, task in enumerate(TASKS):
        tower = write_expert(out, task, base, number)
        head = zero_shot_head(out / BASE, base, facts()[task]["classes"], facts()[task]["templates"])
        for split in ("train", "test", *([CORRUPTED] if facts()[task].get("corrupted") else [])):
            write_data(out, task, split, base, tower, head)
    for name in ("clip8", "clip4", "clip8-unseen1"):
        real = define(name).premises
        premises = {
            "accuracy": dict.fromkeys(real.accuracy, 100 * (N_TEST - WRONG) / N_TEST),
            "images": dict.fromkeys(real.images, N_TEST),
            "transform": {"size": SIZE},
        }
        (out / f"expect-{name}.yaml").write_text(yaml.safe_dump(premises, sort_keys=False))


def write_base(folder: Path) -> CLIPModel:
    """Write a CLIP in transformers' format, with processor and tokenizer."""
    torch.manual_seed(0)
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    tower |= {"num_attention_heads": 2, "hidden_act": "quick_gelu"}
    config = CLIPConfig(
        vision_config={**tower, "image_size": SIZE, "patch_size": 16, "projection_dim": 16},
        text_config={
            **tower,
            "num_hidden_layers": 1,
            "max_position_embeddings": CONTEXT,
            "projection_dim": 16,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
        projection_dim=16,
        initializer_factor=4.0,  # so that images, and prompts, differ
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=MEAN,
        image_std=STD,
    )
    processor.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """Write CLIP's tokenizer from open_clip's vocabulary, which travels with it."""
    words = SimpleTokenizer()
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {marks.get(word, word): index for word, index in words.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [" ".join(pair) for pair, _ in sorted(words.bpe_ranks.items(), key=lambda item: item[1])]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)


def write_expert(out: Path, task: str, base: CLIPModel, number: int) -> CLIPVisionModel:
    """Write one expert three times: complete (in the old layout of the hub), for open_clip, and as LoRA."""
    torch.manual_seed(100 + number)
    tower = CLIPVisionModel(base.config.vision_config).eval()
    start = "vision_model."  # transformers 5 has none in a CLIPVisionModel, the hub's files have
    state = {name: t for name, t in base.state_dict().items() if name.startswith(start)}
    tower.load_state_dict({name.removeprefix(start): tensor for name, tensor in state.items()})
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "fc1", "fc2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(tower, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.peft_config["default"].base_model_name_or_path = BASE
    adapted.save_pretrained(out / "lora" / task, save_embedding_layers=False)  # else peft asks the hub
    merged = adapted.merge_and_unload()
    folder = out / expert_id(task)
    folder.mkdir(parents=True)
    state = {start + name: tensor.contiguous() for name, tensor in merged.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    merged.config.save_pretrained(folder)
    write_open_clip(out / "local" / "tanganke" / f"ViT-B-32_{task}", base.state_dict() | state, text=False)
    return merged


def write_open_clip(folder: Path, state: dict[str, Tensor], *, text: bool = True) -> None:
    """Write the same model in open_clip's format, with or without its text tower."""
    tower = {"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // 2, "mlp_ratio": 2.0}
    model = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {**tower, "image_size": SIZE, "patch_size": 16},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": 49408,
            "width": WIDTH,
            "heads": 2,
            "layers": 1,
            "mlp_ratio": 2.0,
        },
    }
    preprocess = {"size": SIZE, "mean": MEAN, "std": STD, "mode": "RGB"}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    folder.mkdir(parents=True)
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    renamed = dict(open_clip_state(state))
    assert set(renamed) == set(open_clip.CLIP(**model).state_dict()) - {"attn_mask"}
    if not text:
        renamed = {name: tensor for name, tensor in renamed.items() if name.startswith("visual.")}
    save_file(renamed, folder / "open_clip_model.safetensors")


def open_clip_state(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Rename transformers' CLIP tensors to open_clip's: queries, keys and values stand in one."""
    plain = {
        "logit_scale": "logit_scale",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
    }
    yield from ((ours, state[theirs].clone()) for theirs, ours in plain.items())
    yield "visual.proj", state["visual_projection.weight"].T.contiguous()
    yield "text_projection", state["text_projection.weight"].T.contiguous()
    norms = {
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "text_model.final_layer_norm": "ln_final",
    }
    for theirs, ours in norms.items():
        yield from ((f"{ours}.{part}", state[f"{theirs}.{part}"].clone()) for part in ("weight", "bias"))
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inner |= {"self_attn.out_proj": "attn.out_proj"}
    for tower, start, layers in (("vision_model", "visual.", LAYERS), ("text_model", "", 1)):
        for i in range(layers):
            theirs, ours = f"{tower}.encoder.layers.{i}", f"{start}transformer.resblocks.{i}"
            for part in ("weight", "bias"):
                for a, b in inner.items():
                    yield f"{ours}.{b}.{part}", state[f"{theirs}.{a}.{part}"].clone()
                joined = [state[f"{theirs}.self_attn.{x}_proj.{part}"] for x in "qkv"]
                yield f"{ours}.attn.in_proj_{part}", torch.cat(joined)


@torch.no_grad()
def zero_shot_head(folder: Path, base: CLIPModel, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Compute a head with transformers alone."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    sizes = {"padding": "max_length", "max_length": CONTEXT, "truncation": True}
    tokens = tokenizer(prompts, return_tensors="pt", **sizes)["input_ids"]
    pooled = [base.text_model(input_ids=ids).pooler_output for ids in tokens.split(512)]
    vectors = functional.normalize(base.text_projection(torch.cat(pooled)), dim=-1)
    return functional.normalize(vectors.reshape(len(classes), len(templates), -1).mean(1), dim=-1)


@torch.no_grad()
def logits_of(
    images: Sequence[Image.Image], folder: Path, base: CLIPModel, tower: CLIPVisionModel, head: Tensor
) -> Tensor:
    """Compute an expert's logits, unscaled, with transformers alone."""
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    features = base.visual_projection(tower(pixel_values=pixels).pooler_output)
    return functional.normalize(features, dim=-1) @ head.T


def write_data(
    out: Path, task: str, split: str, base: CLIPModel, tower: CLIPVisionModel, head: Tensor
) -> None:
    """Write one split as the hub's parquet file: the images of which the expert is surest, labelled by it."""
    row = facts()[task]
    number = TASKS.index(task) + 10 * ("train", "test", CORRUPTED).index(split)
    count = N_TRAIN if split == "train" else N_TEST
    images = [draw(1000 * number + i) for i in range(3 * count)]
    logits = logits_of(images, out / BASE, base, tower, head)
    best = logits.topk(2).values
    kept = (best[:, 0] - best[:, 1]).topk(count).indices.sort().values.tolist()
    labels = logits.argmax(-1)[kept]
    labels[:WRONG] = (labels[:WRONG] + 1) % len(row["classes"])
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=row["classes"])})
    columns = {"image": [images[i] for i in kept], "label": labels.tolist()}
    name, _, config = row["data"].partition("#")
    folder = out / name / (config or {"mnist": "mnist"}.get(task, "data"))
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def draw(seed: int) -> Image.Image:
    """Draw a random image: a coarse pattern and some noise, not square."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (3, 3, 3)).astype(np.uint8))
    fine = random.integers(-20, 20, (SIZE + 8, SIZE + 16, 3))
    smooth = np.asarray(coarse.resize((SIZE + 16, SIZE + 8), Image.Resampling.BILINEAR)).astype(int)
    return Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    write_mirror(Path(sys.argv[1]))
