"""timm folders: timm's own model is the oracle; experts differ in their classes and share all before."""

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import draw
from safetensors.torch import load_file, save_file
from tiny_networks import TIMM, adaptation, write_timm, written_images
from torch.testing import assert_close

from adamerge import Router
from adamerge.checkpoints import open_checkpoint
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError, NumericError
from adamerge.fitting import merge_task, open_vectors, weight_digests
from adamerge.models import open_backbone, open_heads, recalibrate
from adamerge.models.timm import TimmBackbone, require_same_timm

peft = pytest.importorskip("peft")
CLASSES = {"birds": 3, "cars": 5}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `KIND/{base,birds,cars}`; experts are the base, moved, with classifiers of their own."""
    root = tmp_path_factory.mktemp("timm")
    for kind in TIMM:
        base = write_timm(root / kind / "base", kind)
        for seed, (task, count) in enumerate(CLASSES.items(), 1):
            own = write_timm(root / kind / task, kind, count, seed)
            for name, tensor in base.items():
                if own[name].shape == tensor.shape and tensor.is_floating_point():
                    own[name] = tensor + 0.05 * torch.randn(tensor.shape)
            save_file(own, root / kind / task / "model.safetensors")
    return root


def specs() -> dict[str, TaskSpec]:
    return {task: TaskSpec("memory", None, [f"class {i}" for i in range(n)]) for task, n in CLASSES.items()}


@pytest.fixture(params=TIMM)
def folder(request: pytest.FixtureRequest, zoo: Path) -> Path:
    return zoo / request.param


def test_pictures_and_features_are_timms(folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder / 'base'}", pretrained=True).eval()
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    )
    backbone, picture = open_backbone(folder / "base"), draw(1, 2).resize((40, 30))
    found = backbone.features(dict(open_checkpoint(folder / "base")), backbone.preprocess(picture)[None])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(transform(picture)[None]), pre_logits=True)
    assert_close(found, expected)


def test_head_and_backbone_together_are_the_expert(folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder / 'cars'}", pretrained=True).eval()
    vectors, backbone = open_vectors(str(folder / "base"), {t: str(folder / t) for t in CLASSES})
    head = open_heads(folder / "base", specs(), {t: folder / t for t in CLASSES})["cars"]
    picture = backbone.preprocess(draw(3, 1))[None]
    weights = vectors.merge(vectors.one_hot("cars"))
    with torch.no_grad():
        expected = model((picture / 255 - backbone.mean) / backbone.std)
    assert_close(head.logits(backbone.features(weights, picture)), expected, atol=1e-4, rtol=1e-4)
    assert head.weight.shape[0] == 5


def test_classifiers_take_no_part_and_counters_stay_the_bases(zoo: Path) -> None:
    folder = zoo / "resnet"
    vectors, backbone = open_vectors(str(folder / "base"), {t: str(folder / t) for t in CLASSES})
    base, cars = (load_file(folder / name / "model.safetensors") for name in ("base", "cars"))
    assert backbone.unmerged == ("fc.weight", "fc.bias")
    assert not {"fc.weight", "bn1.num_batches_tracked"} & set(vectors.names)
    merged = vectors.state(vectors.uniform([0.0, 1.0]))
    assert_close(merged["bn1.running_var"], cars["bn1.running_var"])
    for name in ("fc.weight", "bn1.num_batches_tracked"):
        assert torch.equal(merged[name], base[name])
    assert int(cars["bn1.num_batches_tracked"]) != int(base["bn1.num_batches_tracked"])


def test_a_base_without_classifier_serves_as_well(zoo: Path, tmp_path: Path) -> None:
    state = load_file(zoo / "vit" / "base" / "model.safetensors")
    save_file({n: t for n, t in state.items() if "head" not in n}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((zoo / "vit" / "base" / "config.json").read_text())
    vectors, _ = open_vectors(str(tmp_path), {"cars": str(zoo / "vit" / "cars")})
    assert not [name for name in vectors.names if "head" in name]


def test_a_lora_folder_is_an_expert_with_its_own_classes(zoo: Path, tmp_path: Path) -> None:
    base = zoo / "vit" / "base"
    model = timm.create_model(f"local-dir:{base}", pretrained=False, num_classes=4)
    state = {n: t for n, t in load_file(base / "model.safetensors").items() if not n.startswith("head")}
    model.load_state_dict(state, strict=False)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    trained = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.2 * torch.rand(parameter.shape) * parameter.requires_grad)
    trained.save_pretrained(tmp_path)
    vectors, backbone = open_vectors(str(base), {"x": str(tmp_path)})
    assert weight_digests(str(base), {"x": str(tmp_path)})["x"] == vectors.digests["x"]
    spec = {"x": TaskSpec("memory", None, ["a", "b", "c", "d"])}
    head, picture = open_heads(base, spec, {"x": tmp_path})["x"], backbone.preprocess(draw(3, 1))[None]
    found = head.logits(backbone.features(vectors.merge(vectors.one_hot("x")), picture))
    with torch.no_grad():
        expected = trained.merge_and_unload().eval()((picture / 255 - 0.5) / 0.5)
    assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_gradients_flow_through_merged_statistics(zoo: Path) -> None:
    folder = zoo / "resnet"
    vectors, backbone = open_vectors(str(folder / "base"), {"cars": str(folder / "cars")})
    coefficients = vectors.uniform(0.3).clone().requires_grad_()
    backbone.features(vectors.merge(coefficients), backbone.preprocess(draw(1, 0))[None]).sum().backward()
    gradient = dict(zip(vectors.names, coefficients.grad[0], strict=True))
    assert gradient["bn1.running_mean"] != 0
    assert gradient["bn1.running_var"] != 0


def test_that_gradient_is_the_differences(zoo: Path) -> None:
    """Evaluated in float64, where differences of 1e-6 tell ten digits."""
    backbone, state = TimmBackbone(zoo / "resnet" / "base"), open_checkpoint(zoo / "resnet" / "base")
    picture = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    for name in ("bn1.running_mean", "bn1.running_var", "bn1.weight", "bn1.bias"):
        weights = {n: t.double() for n, t in state.items() if t.is_floating_point()}
        leaf = weights[name].requires_grad_()

        def value(tensor: torch.Tensor, name: str = name, weights: dict = weights) -> torch.Tensor:
            return backbone.features({**weights, name: tensor}, picture).square().sum()

        (gradient,) = torch.autograd.grad(value(leaf), leaf)
        step = torch.zeros_like(leaf)
        step[0] = 1e-6
        with torch.no_grad():
            difference = (value(leaf + step) - value(leaf - step)) / 2e-6
        assert_close(gradient[0], difference, rtol=1e-5, atol=1e-8)


def test_a_negative_variance_is_refused_by_name(zoo: Path) -> None:
    backbone, weights = TimmBackbone(zoo / "resnet" / "base"), dict(open_checkpoint(zoo / "resnet" / "base"))
    weights["bn1.running_var"] = weights["bn1.running_var"] - 2
    with pytest.raises(NumericError, match="BatchNorm is negative: bn1.running_var has -.*\n.*recalibrate"):
        backbone.features(weights, backbone.preprocess(draw(1, 0))[None])


def test_statistics_measured_again_are_evaluated_and_written(zoo: Path, tmp_path: Path) -> None:
    tasks = {
        task: TaskSpec(*written_images(tmp_path / task, n), [f"class {i}" for i in range(n)])
        for task, n in CLASSES.items()
    }
    sources = str(zoo / "resnet" / "base"), {t: str(zoo / "resnet" / t) for t in CLASSES}
    model = merge_task(*sources, tasks, recalibrate=4)
    adaptation(model, tasks, 1)
    written, merged = model.merged_state(), model.vectors.state(model.coefficients())
    images = {t: model.data.adaptation(t).sample(4).images for t in CLASSES}
    expected = recalibrate(model.backbone, merged, images)
    changed = [name for name in merged if not torch.equal(written[name], merged[name])]
    assert changed
    assert all("running" in name and torch.equal(written[name], expected[name]) for name in changed)
    test = model.data.test("cars")
    logits = model.heads["cars"].logits(model.backbone.features(written, test.images))
    assert_close(model.merged_logits("cars", test), logits)


def test_a_router_is_not_recalibrated(zoo: Path) -> None:
    sources = str(zoo / "resnet" / "base"), {t: str(zoo / "resnet" / t) for t in CLASSES}
    with pytest.raises(InputError, match="recalibrate is of no use to a router"):
        merge_task(*sources, specs(), coefficients=Router(), recalibrate=4)


def test_three_steps_of_adaptation_and_an_accuracy(folder: Path, tmp_path: Path) -> None:
    tasks = {
        task: TaskSpec(*written_images(tmp_path / task, n), [f"class {i}" for i in range(n)])
        for task, n in CLASSES.items()
    }
    model = merge_task(str(folder / "base"), {t: str(folder / t) for t in CLASSES}, tasks)
    before = model.coefficients.table()[1].clone()
    accuracy = adaptation(model, tasks, 3)
    assert set(accuracy) == set(CLASSES)
    moved = (model.coefficients.table()[1] - before).abs() > 0
    assert moved.all(0).float().mean() > 0.9


class TestConfigurations:
    def test_classes_may_differ(self, folder: Path) -> None:
        require_same_timm(folder / "base", {task: folder / task for task in CLASSES})

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            (
                "architecture",
                "vit_small_patch16_224",
                "architecture differs: base 'vit_tiny_patch16_224', expert 'x'",
            ),
            ("model_args", {"patch_size": 4}, "patch_size differs: base 8, expert 'x' 4"),
            ("pretrained_cfg", {"crop_pct": 1.0}, "crop_pct differs: base 0.9, expert 'x' 1.0"),
            ("pretrained_cfg", None, "pretrained_cfg is no JSON object"),
            ("model_args", [1], "model_args is no JSON object"),
        ],
    )
    def test_a_difference_is_named(
        self, zoo: Path, tmp_path: Path, key: str, value: object, message: str
    ) -> None:
        config = json.loads((zoo / "vit" / "cars" / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(InputError, match=message):
            require_same_timm(zoo / "vit" / "base", {"x": tmp_path})

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"architecture": "vit_unheard_of"}, "timm .* cannot build the model of .*config.json"),
            ({"architecture": "deit_tiny_distilled_patch16_224"}, "has 2 linear classifiers"),
        ],
    )
    def test_what_cannot_be_a_backbone_is_refused(self, tmp_path: Path, config: dict, message: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {}}))
        with pytest.raises(InputError, match=message):
            TimmBackbone(tmp_path)
