"""Models are recognised by their files; what weights do not tell must be stated, and must agree."""

import json
import pickle
import re
import shutil
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from builders import write_benchmark
from conftest import CLASSES, TASKS, tiny_config, write_clip
from hub_mirror import draw, write_base
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from adamerge import Router, TaskSpec
from adamerge.checkpoints import locate, open_checkpoint, save
from adamerge.checkpoints.open_clip_source import open_clip_folder
from adamerge.cli import main
from adamerge.errors import EnvironmentProblem, InputError
from adamerge.fitting import open_vectors
from adamerge.mixture import Mixture, load, save_mixture
from adamerge.models import Head, OpenClipBackbone, open_backbone, open_heads
from adamerge.models.hf_clip import HfClipBackbone
from adamerge.models.opening import activation_of, format_of, require_same_function

ARCHITECTURE = "tiny-adamerge"


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    write_base(root / "base")
    return root / "base"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let open_clip know a tiny architecture in both activations, and a tag of QuickGELU weights."""
    config = tiny_config()["model_cfg"]
    quick = f"{ARCHITECTURE}-quickgelu"
    configs = {ARCHITECTURE: config, quick: config | {"quick_gelu": True}}
    tag = {"hf_hub": "owner/tiny/", "quick_gelu": True, "resize_mode": "squash"}
    tag |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    monkeypatch.setattr(open_clip, "get_model_config", configs.get)
    monkeypatch.setattr(open_clip, "list_models", lambda: [*configs])
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["ours"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, found: tag)


def test_a_folder_is_recognised_by_its_files(clip: Path, hugging_face: Path) -> None:
    assert isinstance(open_backbone(clip / "base"), OpenClipBackbone)
    assert isinstance(open_backbone(str(hugging_face)), HfClipBackbone)
    assert isinstance(open_backbone("embedded:base"), OpenClipBackbone)


def test_an_unknown_folder_is_told_with_what_it_holds(clip: Path) -> None:
    with pytest.raises(InputError, match="of a known format .open_clip, .*; it holds: bars.safetensors"):
        open_backbone(clip / "experts")


def test_a_clip_with_another_head_is_no_clip_of_ours(hugging_face: Path, tmp_path: Path) -> None:
    config = json.loads((hugging_face / "config.json").read_text())
    config["architectures"] = ["CLIPForImageClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert activation_of(tmp_path) is None


def test_of_two_models_in_one_folder_configuration_and_weights_are_one(
    clip: Path, hugging_face: Path, tmp_path: Path
) -> None:
    """LAION's repositories hold both forms."""
    both = shutil.copytree(hugging_face, tmp_path / "both")
    shutil.copytree(clip / "base", both, dirs_exist_ok=True)
    assert isinstance(open_backbone(both), OpenClipBackbone)
    assert "visual.proj" in open_checkpoint(both)


def test_weights_that_lack_what_the_configuration_asks_for_are_refused(tmp_path: Path) -> None:
    state = write_clip(tmp_path / "base")
    state.pop("visual.proj")
    save_file(state, tmp_path / "base" / "open_clip_model.safetensors")
    with pytest.raises(InputError, match="lack 1 tensors that its open_clip .* asks for: visual.proj"):
        open_backbone(tmp_path / "base")


@pytest.mark.usefixtures("known")
class TestOpenClipSources:
    @pytest.fixture
    def file(self, clip: Path) -> Path:
        return clip / "base" / "open_clip_model.safetensors"

    def test_a_file_with_its_architecture_is_a_folder(self, clip: Path, file: Path) -> None:
        source = f"open_clip:{ARCHITECTURE}={file}"
        images = torch.zeros(1, 3, 14, 14, dtype=torch.uint8)
        state = dict(open_checkpoint(locate(source)))
        ours, theirs = open_backbone(source), open_backbone(clip / "base")
        ours.mean, ours.std = theirs.mean, theirs.std
        assert torch.equal(ours.features(state, images), theirs.features(state, images))
        assert (ours.activation, theirs.activation) == ("gelu", "gelu")
        assert open_backbone(f"open_clip:{ARCHITECTURE}-quickgelu={file}").activation == "quick_gelu"

    def test_a_file_is_prepared_as_the_tags_of_its_architecture(self, file: Path) -> None:
        key = json.loads(open_backbone(f"open_clip:{ARCHITECTURE}={file}").transform_key)
        assert (key["mean"], key["resize_mode"], key["size"]) == ([0.1, 0.2, 0.3], "squash", [14, 14])

    def test_a_merged_model_is_a_folder_that_plain_open_clip_loads(
        self, clip: Path, file: Path, tmp_path: Path
    ) -> None:
        base = f"open_clip:{ARCHITECTURE}={file}"
        vectors, _ = open_vectors(base, {t: str(clip / "experts" / f"{t}.safetensors") for t in TASKS})
        save(vectors.state(vectors.uniform(0.1)), tmp_path / "merged", like=locate(base))
        model = open_clip.create_model(f"local-dir:{tmp_path / 'merged'}")
        assert_close(model.visual.proj.detach(), vectors.merge(vectors.uniform(0.1))["visual.proj"])

    def test_the_weights_keep_their_place_and_permissions(self, file: Path) -> None:
        before = file.stat()
        folder = open_clip_folder(f"open_clip:{ARCHITECTURE}={file}")
        assert (folder / "open_clip_model.safetensors").is_symlink()
        assert file.stat() == before
        assert open_clip_folder(f"open_clip:{ARCHITECTURE}={file}") == folder

    def test_a_tag_comes_from_the_hub(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(
            "adamerge.checkpoints.open_clip_source.snapshot", lambda *a: asked.append(a) or file.parent
        )
        source = f"open_clip:{ARCHITECTURE}-quickgelu/ours"
        assert open_backbone(source).activation == "quick_gelu"
        assert asked[0] == ("owner/tiny", source, ["open_clip_model.safetensors"])
        monkeypatch.setattr("adamerge.checkpoints.open_clip_source.snapshot", lambda *_: file.parents[1])
        with pytest.raises(InputError, match="owner/tiny has no open_clip_model.safetensors"):
            locate(source)

    def test_without_network_it_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(EnvironmentProblem, match="the hub cannot be reached"):
            locate(f"open_clip:{ARCHITECTURE}-quickgelu/ours")

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("tiny-adamerge", "names no weights.\nWrite open_clip:ARCHITECTURE/TAG"),
            ("tiny-adamerg/ours", "no architecture 'tiny-adamerg'.\nDid you mean 'tiny-adamerge'"),
            ("tiny-adamerge/our", "no weights 'our' of tiny-adamerge.\nDid you mean 'ours'"),
            ("tiny-adamerge=no.safetensors", "no.safetensors is no file"),
            (
                "tiny-adamerge/ours",
                "activation differs: architecture tiny-adamerge gelu, weights 'ours' quick_gelu.\n"
                "Write open_clip:tiny-adamerge-quickgelu/ours",
            ),
        ],
    )
    def test_what_is_unknown_or_differs_is_refused(self, source: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            open_backbone(f"open_clip:{source}")

    def test_a_pickle_is_refused_by_the_name_that_the_user_gave(self, tmp_path: Path) -> None:
        (tmp_path / "old.pt").write_bytes(pickle.dumps({}))
        with pytest.raises(InputError, match=r"old\.pt cannot be read: it is a pickle"):
            locate(f"open_clip:{ARCHITECTURE}={tmp_path / 'old.pt'}")

    def test_preprocessing_that_differs_among_tags_is_not_guessed(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ways = {"a": {"mean": [0.5]}, "b": {"mean": [0.4]}}
        monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: [*ways])
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: ways[tag])
        with pytest.raises(InputError, match="prepare images in 2 ways.\nName the tag"):
            locate(f"open_clip:{ARCHITECTURE}={file}")
        folder = locate(f"open_clip:{ARCHITECTURE}/b={file}")
        config = json.loads((folder / "open_clip_config.json").read_text())
        assert config["preprocess_cfg"]["mean"] == [0.4]


class TestSameFunction:
    def quick(self, folder: Path, *, quick: bool | None) -> Path:
        config = tiny_config()
        config["model_cfg"] |= {} if quick is None else {"quick_gelu": quick}
        write_clip(folder, config=config)
        return folder

    def test_activations_are_compared_across_formats(self, hugging_face: Path, tmp_path: Path) -> None:
        expert = self.quick(tmp_path / "x", quick=None)
        with pytest.raises(InputError, match="activation differs: base quick_gelu, expert 'x' gelu"):
            require_same_function(hugging_face, {"x": expert})
        with pytest.raises(InputError, match="activation differs: base gelu, expert 'x' quick_gelu"):
            require_same_function(expert, {"x": self.quick(tmp_path / "y", quick=True)})

    def test_what_is_not_said_is_gelu_in_open_clip(self, tmp_path: Path) -> None:
        folders = [self.quick(tmp_path / str(quick), quick=quick) for quick in (None, False)]
        require_same_function(folders[0], {"x": folders[1]})

    def test_preprocessing_of_hugging_face_folders_is_compared(
        self, hugging_face: Path, tmp_path: Path
    ) -> None:
        expert = shutil.copytree(hugging_face, tmp_path / "x")
        file = expert / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
        with pytest.raises(InputError, match="image_mean differs"):
            open_vectors(str(hugging_face), {"x": str(expert)})


def test_head_files_need_no_text_tower(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 12)}, tmp_path / "head.safetensors")
    heads = open_heads(tmp_path, {"a": TaskSpec("x", head=str(tmp_path / "head.safetensors"))})
    assert torch.equal(heads["a"].weight, torch.ones(2, 12))


def test_an_image_tower_of_open_clip_has_no_text_tower(tmp_path: Path) -> None:
    state = write_clip(tmp_path / "base")
    save_file(
        {name: tensor for name, tensor in state.items() if name.startswith("visual.")},
        tmp_path / "base" / "open_clip_model.safetensors",
    )
    with pytest.raises(InputError, match="has no text tower .*\nGive as base the complete CLIP"):
        open_heads(tmp_path / "base", {"a": TaskSpec("x", None, ["dog"])})


def test_a_routed_model_reloads_with_the_backbone_of_its_base(hugging_face: Path, tmp_path: Path) -> None:
    state = load_file(hugging_face / "model.safetensors")
    experts = {}
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        tower = {n: t + 0.05 * torch.randn_like(t) for n, t in state.items() if n.startswith("vision_model.")}
        save_file(tower, tmp_path / f"{task}.safetensors")
        experts[task] = str(tmp_path / f"{task}.safetensors")
    vectors, backbone = open_vectors(str(hugging_face), experts, codec="low_rank")
    heads = {task: Head(torch.randn(len(CLASSES[task]), 16)) for task in TASKS}
    mixture = Mixture(vectors, backbone, heads, Router("linear"), CLASSES).eval()
    save_mixture(mixture, tmp_path / "routed", like=hugging_face)
    found = load(tmp_path / "routed")
    assert isinstance(found.backbone, HfClipBackbone)
    ours, theirs = (m.predict([draw(1), draw(2)]) for m in (mixture, found))
    assert torch.equal(ours.probability, theirs.probability)
    assert format_of(tmp_path / "routed").name == "Hugging Face CLIP"


@pytest.mark.parametrize("form", ["open_clip", "hugging_face"])
def test_a_weight_that_is_missing_is_named(clip: Path, hugging_face: Path, form: str) -> None:
    """A module without values would compute with memory that nobody has written."""
    base, name = (
        (clip / "base", "visual.proj") if form == "open_clip" else (hugging_face, "visual_projection.weight")
    )
    state = {n: tensor for n, tensor in open_checkpoint(base).items() if n != name}
    with pytest.raises(InputError, match=f"the weights lack {name}"):
        open_backbone(base).features(state, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_moving_takes_the_counters_of_a_module_without_values_along(hugging_face: Path) -> None:
    backbone = open_backbone(hugging_face)
    before = {name: b.device.type for name, b in backbone.module.named_buffers()}
    after: dict[str, Tensor] = dict(backbone.to(torch.device("meta")).module.named_buffers())
    assert set(before.values()) == {"cpu"}
    assert {b.device.type for b in after.values()} == {"meta"}


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((2, 12), torch.nan), "head of task 'dots' has values that are not finite: weight"),
        (torch.full((2, 12), torch.inf), "head of task 'dots' has values that are not finite: weight"),
        (torch.ones(2, 12, dtype=torch.int64), "no matrix 'weight' of numbers; it holds weight torch.int64"),
        (torch.ones(12), r"no matrix 'weight' of numbers; it holds weight torch.float32 \[12\]"),
        (torch.ones(2, 13), "head of task 'dots' reads 13 dimensions, the features have 12"),
        (torch.ones(1, 12), "head of task 'dots' has 1 output"),
    ],
)
def test_a_head_that_cannot_serve_is_refused_before_anything_is_written(
    weight: Tensor, message: str, clip: Path, rows: dict[str, dict], tmp_path: Path, capsys
) -> None:
    save_file({"weight": weight}, tmp_path / "head.safetensors")
    rows["dots"] |= {"head": str(tmp_path / "head.safetensors")}
    benchmark = write_benchmark(tmp_path / "inputs", clip, rows)
    run, table = tmp_path / "run", str(tmp_path / "table")
    assert main(["fit", "--config", str(benchmark), "--run_dir", str(run), "--trainer.max_steps", "1"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not run.exists()
    assert main(["bench", "run", str(benchmark), "--methods", "average", "--out", table]) == 2
    assert re.search(message, capsys.readouterr().err)
