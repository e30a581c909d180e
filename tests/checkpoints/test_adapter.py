"""PEFT folders as experts: PEFT's own merge is the oracle, and what cannot be merged is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adamerge.checkpoints import hub, is_adapter, open_checkpoint
from adamerge.checkpoints.adapter import open_adapter
from adamerge.errors import InputError
from adamerge.state import LazyState, audit
from adamerge.vectors.store import open_expert

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # PEFT corrects the setting
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT asks transformers
    pytest.mark.filterwarnings("ignore:[\\s\\S]*A 1-D or zero-sized lora_A"),  # PEFT of its own biases
]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
State = dict[str, Tensor]
Saved = Callable[[str], tuple[Path, State, State]]


class Layers(nn.Module):
    """One layer of each kind; `square` does not tell by its shape how it is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.line, self.volume = nn.Conv1d(3, 6, 3), nn.Conv3d(2, 4, (1, 2, 3))
        self.image, self.point = nn.Conv2d(3, 6, (2, 3)), nn.Conv2d(6, 5, 1)
        self.square, self.wide, self.plain = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(5, 7, bias=False)
        self.norm = nn.BatchNorm1d(5)


def gpt() -> nn.Module:
    """A model of Conv1D layers, which store [in, out]; `attn.c_proj` is square."""
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=16)
    return transformers.GPT2Model(config)


def clip() -> nn.Module:
    sizes = {"image_size": 14, "patch_size": 7, "hidden_size": 16, "intermediate_size": 24}
    config = transformers.CLIPVisionConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    return transformers.CLIPVisionModel(config)


LINEAR, CONVOLUTIONS = ["square", "wide", "plain"], ["line", "image", "point", "volume"]
GPT, TRANSPOSED = ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "LoRA": (Layers, {"target_modules": LINEAR}),
    "rsLoRA": (Layers, {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        Layers,
        {
            "target_modules": LINEAR,
            "rank_pattern": {"wi.e": 3, "pl.*n": 1},
            "alpha_pattern": {"^square": 5, "wide": 2},
        },
    ),
    "embedding": (Layers, {"target_modules": ["words", "wide"]}),
    "convolutions": (Layers, {"target_modules": CONVOLUTIONS}),
    "trained biases of LoRA": (Layers, {"target_modules": ["wide", "image"], "lora_bias": True}),
    "all biases": (Layers, {"target_modules": ["wide", "image"], "bias": "all"}),
    "biases of targets": (Layers, {"target_modules": ["wide", "image"], "bias": "lora_only"}),
    "both biases": (Layers, {"target_modules": ["wide", "image"], "bias": "all", "lora_bias": True}),
    "saved modules": (Layers, {"target_modules": ["wide"], "modules_to_save": ["norm", "plain"]}),
    "DoRA": (Layers, {"target_modules": LINEAR, "use_dora": True, "use_rslora": True}),
    "Conv1D": (gpt, {"target_modules": GPT, **TRANSPOSED}),
    "Conv1D, setting corrected by PEFT": (gpt, {"target_modules": GPT}),
    "DoRA of Conv1D": (gpt, {"target_modules": GPT, **TRANSPOSED, "use_dora": True}),
    "embedding of GPT-2": (gpt, {"target_modules": ["wte", "c_attn"], **TRANSPOSED}),
    "CLIP": (clip, {"target_modules": ["q_proj", "v_proj", "fc1"]}),
    "CLIP, all linear": (clip, {"target_modules": "all-linear", "modules_to_save": ["post_layernorm"]}),
}


def train(model: nn.Module, folder: Path, seed: int = 1, **settings: Any) -> tuple[State, State]:
    """Save an adapter with random weights; give the base's state and the one that PEFT merges."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, **settings})
    trained = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    learned = [p.data for p in trained.parameters() if p.requires_grad]
    learned += [b for n, b in trained.named_buffers() if "modules_to_save" in n and b.is_floating_point()]
    for tensor in learned:
        tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.3)
    trained.save_pretrained(folder)
    return base, {n: t.clone() for n, t in trained.merge_and_unload().state_dict().items()}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Give by kind: the adapter's folder, the base and PEFT's merge; each is made once."""
    made: dict[str, tuple[Path, State, State]] = {}

    def make(kind: str) -> tuple[Path, State, State]:
        if kind not in made:
            torch.manual_seed(0)
            build, settings = KINDS[kind]
            folder = tmp_path_factory.mktemp("adapter")
            made[kind] = (folder, *train(build(), folder, **settings))
        return made[kind]

    return make


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    """A copy of a LoRA folder, to be damaged."""
    return Path(shutil.copytree(saved("LoRA")[0], tmp_path / "adapter"))


@pytest.fixture
def base(saved: Saved) -> State:
    """What `folder` was trained on."""
    return dict(saved("LoRA")[1])


def configure(folder: Path, **settings: object) -> None:
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(found | settings))


def rewrite(folder: Path, change: Callable[[State], State]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= 1e-6 * expected.double().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_what_peft_merges(kind: str, saved: Saved) -> None:
    folder, base, merged = saved(kind)
    expert = open_adapter(folder, base, role="expert")
    assert set(expert) == set(merged)
    for name, tensor in merged.items():
        assert_close(expert[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_are_the_change(kind: str, saved: Saved) -> None:
    folder, base, merged = saved(kind)
    expert = open_adapter(folder, base, role="expert")
    assert expert.changed == tuple(name for name in base if not torch.equal(base[name], merged[name]))
    for name in expert.changed:
        delta = expert.delta(name)
        assert delta is not None
        assert delta.dtype == torch.float32
        assert_close(base[name] + delta, expert[name])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_changed_is_the_base_itself(kind: str, saved: Saved) -> None:
    folder, base, _ = saved(kind)
    expert = open_adapter(folder, base, role="expert")
    untouched = set(base) - set(expert.changed)
    assert untouched
    for name in untouched:
        assert expert[name] is base[name]
        assert expert.delta(name) is expert.rank(name) is None


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "patterns", "embedding", "convolutions", "Conv1D"])
def test_the_rank_of_a_delta_is_r(kind: str, saved: Saved) -> None:
    folder, base, _ = saved(kind)
    expert = open_adapter(folder, base, role="expert")
    for name in expert.changed:
        delta = expert.delta(name)
        assert delta is not None
        assert torch.linalg.matrix_rank(delta.flatten(1), rtol=1e-5) == expert.rank(name)


@pytest.mark.parametrize("kind", ["DoRA", "saved modules", "all biases"])
def test_other_changes_have_no_rank(kind: str, saved: Saved) -> None:
    folder, base, _ = saved(kind)
    expert = open_adapter(folder, base, role="expert")
    whole = {"DoRA": "square.weight", "saved modules": "plain.weight", "all biases": "norm.bias"}[kind]
    assert whole in expert.changed
    assert expert.rank(whole) is None


def test_matrices_in_half_precision_are_multiplied_in_fp32(folder: Path, base: State) -> None:
    rewrite(folder, lambda found: {key: tensor.bfloat16() for key, tensor in found.items()})
    stored = load_file(folder / WEIGHTS)
    b, a = (stored[f"base_model.model.wide.lora_{x}.weight"].float() for x in "BA")
    assert torch.equal(open_adapter(folder, base, role="expert").delta("wide.weight"), 3.0 * (b @ a))


def test_a_base_in_a_file_is_read_lazily_and_widened(folder: Path, base: State, tmp_path: Path) -> None:
    save_file(
        {name: t.bfloat16() if t.is_floating_point() else t for name, t in base.items()}, tmp_path / "b"
    )
    file = open_checkpoint(tmp_path / "b")
    expert = open_adapter(folder, file, role="expert")
    assert isinstance(expert, LazyState)
    assert list(expert) == list(file)
    assert len(expert) == len(file)
    assert "wide.weight" in expert
    assert "other" not in expert
    assert expert.info("wide.weight") == ((5, 8), torch.float32)
    assert expert.info("wide.bias") == ((5,), torch.bfloat16)
    delta = open_adapter(folder, base, role="expert").delta("wide.weight")
    assert torch.equal(expert["wide.weight"], file["wide.weight"].float() + delta)
    assert set(expert.changed) < set(audit(file, {"cars": expert}))


def test_the_digest_covers_settings_and_weights(folder: Path, base: State) -> None:
    expert = open_adapter(folder, base, role="expert")
    assert (expert.root, expert.files) == (folder, (folder / CONFIG, folder / WEIGHTS))
    digests = {expert.file_digest()}
    configure(folder, lora_alpha=7)
    digests.add(expert.file_digest())
    rewrite(folder, lambda found: {key: 2 * tensor for key, tensor in found.items()})
    digests.add(expert.file_digest())
    assert len(digests) == 3


def test_a_folder_is_an_adapter_unless_it_holds_a_whole_model(folder: Path, tmp_path: Path) -> None:
    assert is_adapter(folder)
    assert not is_adapter(tmp_path)
    assert not is_adapter(folder / WEIGHTS)
    assert not is_adapter("owner/name")
    (folder / "model.safetensors").touch()
    assert not is_adapter(folder)


def test_a_hub_id_is_fetched(folder: Path, base: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch", lambda *_: folder)
    assert open_adapter("owner/name", base, role="expert").root == folder


def test_one_prefix_more_in_the_base_is_bridged(folder: Path, base: State) -> None:
    expert = open_adapter(folder, {f"vision_model.{n}": t for n, t in base.items()}, role="expert")
    assert expert.changed == tuple(f"vision_model.{name}.weight" for name in ("square", "wide", "plain"))


def test_one_prefix_less_in_the_base_is_bridged(folder: Path, base: State) -> None:
    rewrite(
        folder, lambda found: {k.replace("model.model.", "model.model.module."): t for k, t in found.items()}
    )
    assert open_adapter(folder, base, role="expert").changed == (
        "square.weight",
        "wide.weight",
        "plain.weight",
    )


def test_of_two_towers_the_one_of_the_adapters_shapes_is_meant(folder: Path, base: State) -> None:
    towers = {f"visual.{n}": t for n, t in base.items()} | {
        f"text.{n}": t[:3] for n, t in base.items() if t.ndim
    }
    expert = open_adapter(folder, towers, role="expert")
    assert all(name.startswith("visual.") for name in expert.changed)


def test_two_towers_of_the_same_shapes_are_refused(folder: Path, base: State) -> None:
    towers = {f"{tower}.{n}": t for tower in ("visual", "text") for n, t in base.items()}
    with pytest.raises(InputError, match="several places: text.plain.weight, visual.plain.weight"):
        open_adapter(folder, towers, role="expert")


def test_all_that_does_not_fit_is_listed(folder: Path, base: State) -> None:
    base["plain.weight"] = torch.zeros(6, 5)
    del base["wide.weight"]
    base["square.weight"] = base["square.weight"].to(torch.int8)
    with pytest.raises(InputError) as caught:
        open_adapter(folder, base, role="expert 'cars'")
    assert str(caught.value) == (
        "expert 'cars': 3 of 3 changed tensors do not fit the base: plain.weight [7, 5] vs base [6, 5], "
        "square.weight is torch.int8 in the base (dequantise it first), wide.weight is not in the base.\n"
        "Give the base that the adapter was trained on."
    )


def test_a_changed_tensor_may_not_be_tied(folder: Path, base: State) -> None:
    base["head.weight"] = base["wide.weight"]
    with pytest.raises(InputError, match="changes wide.weight, which the base holds again as head.weight"):
        open_adapter(folder, base, role="expert")


def test_zeros_are_nobodys_copy(folder: Path, base: State) -> None:
    base["wide.weight"] = torch.zeros(5, 8)
    base["head.weight"] = torch.zeros(5, 8)
    assert open_adapter(folder, base, role="expert").changed


def test_square_layers_need_a_setting_that_the_others_confirm(saved: Saved, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("Conv1D")[0], tmp_path / "adapter"))
    configure(folder, fan_in_fan_out=False)
    with pytest.raises(InputError, match=r"square ones can be read in two ways: h.0.attn.c_proj.weight."):
        open_adapter(folder, saved("Conv1D")[1], role="expert")


def test_lora_on_multihead_attention_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    base, _ = train(model, tmp_path, target_modules=["attn"])
    with pytest.raises(InputError, match=r"attn.base_layer.out_proj is LoRA on an nn.MultiheadAttention"):
        open_adapter(tmp_path, base, role="expert")


@pytest.mark.parametrize(("target", "layer"), [("words", "an embedding"), ("image", "a convolution")])
def test_dora_is_for_linear_layers(target: str, layer: str, tmp_path: Path) -> None:
    base, _ = train(Layers(), tmp_path, target_modules=[target], use_dora=True)
    with pytest.raises(InputError, match=f"{target}: of DoRA only that of linear layers"):
        open_adapter(tmp_path, base, role=layer)


@pytest.mark.parametrize(
    "setting",
    [
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"use_qalora": True},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["experts.weight"]},
        {"ensure_weight_tying": True},
        {"from_the_future": 1},
    ],
    ids=str,
)
def test_settings_that_are_not_reproduced_are_refused(
    setting: dict[str, object], folder: Path, base: State
) -> None:
    configure(folder, **setting)
    with pytest.raises(InputError) as caught:
        open_adapter(folder, base, role="expert 'cars'")
    ((key, value),) = setting.items()
    assert f"sets {key}={value!r}" in str(caught.value)
    assert "merge_and_unload()" in str(caught.value)


@pytest.mark.parametrize("init", [False, "gaussian", "eva", "orthogonal"])
def test_inits_that_leave_the_base_alone_are_accepted(init: object, folder: Path, base: State) -> None:
    configure(folder, init_lora_weights=init)
    assert open_adapter(folder, base, role="expert").changed


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


def drop_b(found: State) -> State:
    return {key: tensor for key, tensor in found.items() if "wide.lora_B" not in key}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "only a pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        r"has no adapter_model.safetensors; it holds: README.md, adapter_config.json, adapter_model.bin",
    ),
    "no settings": (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json is missing or damaged"),
    "no JSON": (
        lambda folder: (folder / CONFIG).write_text("{"),
        "adapter_config.json is missing or damaged",
    ),
    "no object": (
        lambda folder: (folder / CONFIG).write_text("[1]"),
        "adapter_config.json is missing or damaged",
    ),
    "no rank": (lambda folder: configure(folder, r=None), "damaged: rank or alpha of plain"),
    "rank 0": (lambda folder: configure(folder, r=0), "damaged: rank or alpha of plain"),
    "a broken pattern": (
        lambda folder: configure(folder, rank_pattern={"(": 2}),
        "damaged: rank or alpha of plain",
    ),
    "another rank": (
        lambda folder: configure(folder, r=4),
        r"plain: A \[2, 5\] and B \[7, 2\] are not of the rank that adapter_config.json gives it, 4",
    ),
    "B alone": (
        lambda folder: rewrite(folder, drop_b),
        "wide has lora_A.weight where adapter_config.json asks for lora_A.weight, lora_B.weight",
    ),
    "no magnitudes": (
        lambda folder: configure(folder, use_dora=True),
        "asks for lora_A.weight, lora_B.weight, lora_magnitude_vector",
    ),
    "cut off": (cut, "cut off"),
    "no folder": (shutil.rmtree, "adapter does not exist; .* holds nothing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_with_its_reason(damage: str, folder: Path, base: State) -> None:
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(InputError, match=f"expert 'cars': .*{message}"):
        open_adapter(folder, base, role="expert 'cars'")


class TestNamesOfTheLibrary:
    """PEFT names tensors as today's modules are named, and files have older names."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "vit"
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes)
        transformers.ViTForImageClassification(config).save_pretrained(root / "base")
        return root

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"use_rslora": True, "rank_pattern": {".*q_proj": 3}},
            {"use_dora": True},
            {"modules_to_save": ["classifier"]},
        ],
        ids=str,
    )
    def test_an_adapter_is_what_peft_merges(
        self, root: Path, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        model = transformers.ViTForImageClassification.from_pretrained(root / "base")
        train(model, tmp_path / "lora", target_modules=["q_proj", "fc1"], **settings)
        whole = transformers.ViTForImageClassification.from_pretrained(root / "base")
        merged = peft.PeftModel.from_pretrained(whole, tmp_path / "lora").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        base = open_checkpoint(root / "base")
        expert = open_expert(tmp_path / "lora", "expert 'x'", base)
        expected = load_file(tmp_path / "merged" / "model.safetensors")
        assert set(expert) == set(expected)
        for name, tensor in expected.items():
            assert_close(expert[name], tensor)

    def test_a_classifier_of_other_classes_is_left_to_the_audit(self, root: Path, tmp_path: Path) -> None:
        model = transformers.ViTForImageClassification.from_pretrained(
            root / "base", num_labels=5, ignore_mismatched_sizes=True
        )
        train(model, tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["classifier"])
        base = open_checkpoint(root / "base")
        expert = open_expert(tmp_path / "lora", "expert 'x'", base)
        with pytest.raises(InputError, match="differ from the base in shape: classifier"):
            audit(base, {"x": expert})
        assert audit(base, {"x": expert}, exclude=["classifier.*"])
