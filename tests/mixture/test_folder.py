"""A mixture as a folder: the same outputs to the last bit, and clear words for what cannot be read."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, TASKS
from safetensors.torch import load_file, save_file
from tiny_mixtures import (
    CODECS,
    COMBINED,
    ROUTINGS,
    backbone_of,
    heads_of,
    make_mixture,
    uint8_images,
    vectors_of,
)
from torch import nn

from adamerge.checkpoints import save
from adamerge.coefficients import Router
from adamerge.errors import DataError, EnvironmentProblem, InputError
from adamerge.mixture import Mixture, Predictions, folder, load, save_mixture, stored, write_companions
from adamerge.models import ModuleBackbone
from adamerge.ownership import LIST
from adamerge.vectors import TaskVectors

FILES = {"adamerge.json", "model.safetensors", "open_clip_config.json"}


def predictions(mixture: Mixture) -> list[Predictions]:
    tasks = TASKS[1:] if getattr(mixture.routing, "reads", "") == "task" else (None, TASKS[2])
    return [mixture.predict(uint8_images(), task) for task in tasks]


def assert_equal(found: Mixture, expected: Mixture) -> None:
    """Compare predictions to the last bit."""
    for a, b in zip(predictions(found), predictions(expected), strict=True):
        assert (a.task, a.class_name) == (b.task, b.class_name)
        assert torch.equal(a.label, b.label)
        assert torch.equal(a.probability, b.probability)
        assert (a.weights is None) == (b.weights is None)
        assert b.weights is None or torch.equal(a.weights, b.weights)


@pytest.fixture
def base(clip: Path) -> Path:
    return clip / "base"


@pytest.fixture
def saved(clip: Path, base: Path, tmp_path: Path) -> Path:
    return save_mixture(make_mixture(clip, Router(), CODECS["low_rank"]), tmp_path / "model", like=base)


class TestRoundTrip:
    @pytest.mark.parametrize(("name", "codec"), [c for c in COMBINED if {"linear", "low_rank"} & {*c}])
    def test_outputs_are_equal_to_the_last_bit(
        self, clip: Path, base: Path, tmp_path: Path, name: str, codec: str
    ) -> None:
        mixture = make_mixture(clip, ROUTINGS[name](), CODECS[codec], exclude=("visual.conv1*",))
        if name == "twin":  # a trained router has statistics of its own
            mixture.train().routing(torch.randn(9, 12))
        save_mixture(mixture.eval(), tmp_path / "model", like=base)
        found = load(tmp_path / "model")
        assert not found.training
        assert_equal(found, mixture)

    @pytest.mark.parametrize("name", ROUTINGS)
    def test_routings_come_back_with_their_options_and_parameters(
        self, clip: Path, base: Path, tmp_path: Path, name: str
    ) -> None:
        mixture = make_mixture(clip, ROUTINGS[name](), CODECS["low_rank"])
        with torch.no_grad():
            for parameter in mixture.parameters():
                parameter.add_(1)
        found = load(save_mixture(mixture, tmp_path / "model", like=base))
        assert type(found.routing) is type(mixture.routing)
        assert found.routing.options() == mixture.routing.options()
        assert found.routed == mixture.routed
        ours, theirs = mixture.state_dict(), found.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_a_static_model_is_a_folder_too(self, clip: Path, base: Path, tmp_path: Path) -> None:
        mixture = make_mixture(clip, None)
        save_mixture(mixture, tmp_path / "model", like=base)
        assert_equal(load(tmp_path / "model"), mixture)
        names = load_file(tmp_path / "model" / "model.safetensors")
        assert {name.split("/")[0] for name in names} == {"shared", "heads"}

    def test_a_checkpoint_with_companions_is_a_static_model(
        self, clip: Path, base: Path, tmp_path: Path
    ) -> None:
        vectors, heads = vectors_of(clip), heads_of()
        mixture = make_mixture(clip, None)
        state = vectors.state(vectors.uniform(0.3))
        save(
            state,
            tmp_path / "merged",
            like=base,
            companions=lambda out: write_companions(out, heads, CLASSES),
        )
        assert_equal(load(tmp_path / "merged"), mixture)

    def test_a_loaded_model_can_be_saved_and_moved(self, clip: Path, saved: Path, tmp_path: Path) -> None:
        again = save_mixture(load(saved), tmp_path / "again", like=saved)
        shutil.move(again, tmp_path / "elsewhere")
        assert (saved / "model.safetensors").read_bytes() == (
            tmp_path / "elsewhere" / "model.safetensors"
        ).read_bytes()
        assert_equal(load(tmp_path / "elsewhere"), load(saved))

    def test_any_architecture_may_be_given(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 12, bias=False))
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        experts = {task: {n: x + torch.randn_like(x) for n, x in state.items()} for task in TASKS}
        backbone = ModuleBackbone(module)
        vectors = TaskVectors.open(state, experts, force=True)
        mixture = Mixture(vectors, backbone, heads_of(), Router()).eval()
        found = load(save_mixture(mixture, tmp_path / "model"), backbone)
        assert torch.equal(
            found.predict(torch.ones(2, 9)).probability, mixture.predict(torch.ones(2, 9)).probability
        )
        with pytest.raises(InputError, match="no model folder of a known format"):
            load(tmp_path / "model")
        other = ModuleBackbone(nn.Sequential(nn.Linear(9, 12), nn.Tanh()))
        with pytest.raises(InputError, match="the backbone does not read 2.weight of the model"):
            load(tmp_path / "model", other)

    @pytest.mark.parametrize("reads_tied", [True, False])
    def test_tied_weights_are_stored_once(self, tmp_path: Path, reads_tied: bool) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(12, 12)
        module = nn.Sequential()
        module.add_module("z", layer)
        if reads_tied:
            module.add_module("a", nn.Linear(12, 12))
            module.a.weight = layer.weight
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        more = {} if reads_tied else {"x.weight": torch.randn(12, 12)}
        experts = {}
        for task in TASKS:
            expert = {name: x + torch.randn_like(x) for name, x in (state | more).items()}
            twins = {"a.weight": "z.weight"} if reads_tied else {"y.weight": "x.weight"}
            experts[task] = expert | {alias: expert[name].clone() for alias, name in twins.items()}
        base = state | more | ({} if reads_tied else {"y.weight": more["x.weight"].clone()})
        vectors, backbone = TaskVectors.open(base, experts, force=True), ModuleBackbone(module)
        assert len(vectors.aliases) == 1
        mixture = Mixture(vectors, backbone, heads_of(), Router()).eval()
        images = torch.randn(3, 12)
        found = load(save_mixture(mixture, tmp_path / "model"), backbone)
        assert torch.equal(found.predict(images).probability, mixture.predict(images).probability)
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        assert len([name for name in tensors if name.startswith("shared/") and "weight" in name]) == 1


class TestFolder:
    def test_it_holds_safetensors_and_json_and_nothing_else(
        self, clip: Path, base: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "model"
        save_mixture(make_mixture(clip, Router("paper")), out, like=base, card="# A card")
        assert set(os.listdir(out)) == FILES | {"README.md", LIST}
        assert (out / "README.md").read_text() == "# A card"
        for name in ("adamerge.json", "open_clip_config.json"):
            json.loads((out / name).read_text())
        assert load_file(out / "model.safetensors")

    def test_what_the_backbone_does_not_read_is_left_out(self, saved: Path) -> None:
        tensors = load_file(saved / "model.safetensors")
        parts = {name.split("/")[1] for name in tensors if name.startswith("shared/")}
        assert parts
        assert all(name.startswith("visual.") for name in parts)

    def test_experts_that_are_not_routed_are_left_out(self, clip: Path, base: Path, tmp_path: Path) -> None:
        out = save_mixture(make_mixture(clip, Router(groups=r"\.mlp\.")), tmp_path / "model", like=base)
        names = [name for name in load_file(out / "model.safetensors") if name.startswith("experts/")]
        assert names
        assert all(".mlp." in name for name in names)

    def test_provenance_is_written_as_it_is(self, clip: Path, base: Path, tmp_path: Path) -> None:
        given = {"base": "sha256:1", "configuration": {"lr": 0.1}}
        save_mixture(make_mixture(clip, Router()), tmp_path / "model", like=base, provenance=given)
        assert json.loads((tmp_path / "model" / "adamerge.json").read_text())["provenance"] == given

    def test_storage_is_what_the_file_holds(self, clip: Path, base: Path, tmp_path: Path) -> None:
        for codec in CODECS.values():
            mixture = make_mixture(clip, Router("paper"), codec)
            save_mixture(mixture, tmp_path / "model", like=base, overwrite=True)
            tensors = load_file(tmp_path / "model" / "model.safetensors")
            assert sum(size.n_bytes for size in stored(mixture).values()) == sum(
                tensor.nbytes for tensor in tensors.values()
            )

    def test_an_output_is_replaced_only_where_asked(self, clip: Path, base: Path, saved: Path) -> None:
        other = make_mixture(clip, None)
        with pytest.raises(InputError, match="output .* exists already"):
            save_mixture(other, saved, like=base)
        assert load(saved).routing is not None
        save_mixture(other, saved, like=base, overwrite=True)
        assert load(saved).routing is None

    def test_a_base_without_configuration_is_refused(self, clip: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no model folder of a known format"):
            save_mixture(make_mixture(clip, Router()), tmp_path / "model", like=clip / "experts")
        assert os.listdir(tmp_path) == []

    def test_experts_in_files_of_their_own_are_refused(self, clip: Path, base: Path, tmp_path: Path) -> None:
        experts = {task: clip / "experts" / f"{task}.safetensors" for task in TASKS}
        backbone = backbone_of(clip)
        options: dict[str, Any] = {"names": set(backbone.names), "allow_missing": ["*"]}
        mixture = Mixture(
            TaskVectors.open(base, experts, "stream", **options), backbone, heads_of(), Router()
        )
        with pytest.raises(InputError, match="StreamedBlock, which has no form in a file.\nUse codec="):
            save_mixture(mixture, tmp_path / "model", like=base)


class TestInterruptedSaving:
    @pytest.mark.parametrize("moment", ["copy_companions", "save_tensors", "_write_document"])
    @pytest.mark.parametrize("there_before", [True, False])
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
    def test_the_old_folder_or_nothing_is_left(
        self,
        clip: Path,
        base: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        moment: str,
        there_before: bool,
        kind: type[BaseException],
    ) -> None:
        out, old = tmp_path / "model", make_mixture(clip, None)
        if there_before:
            save_mixture(old, out, like=base)

        def interrupt(*_: object) -> None:
            raise kind(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(f"adamerge.mixture.folder.{moment}", interrupt)
        with pytest.raises(EnvironmentProblem if kind is OSError else kind):
            save_mixture(make_mixture(clip, Router()), out, like=base, overwrite=True)
        monkeypatch.undo()
        assert os.listdir(tmp_path) == (["model"] if there_before else [])
        if there_before:
            assert_equal(load(out), old)

    def test_too_little_space_is_found_before_writing(
        self, clip: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 5))
        with pytest.raises(EnvironmentProblem, match="5 bytes|0 MiB are free"):
            save_mixture(make_mixture(clip, Router()), tmp_path / "deep" / "er", like=base)
        assert os.listdir(tmp_path) == []


def change_document(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        document = json.loads((path / folder.DOCUMENT).read_text())
        change(document)
        (path / folder.DOCUMENT).write_text(json.dumps(document))

    return damage


def without_tensor(name: str) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        tensors = load_file(path / folder.WEIGHTS)
        kept = {key: tensor for key, tensor in tensors.items() if name not in key}
        assert len(kept) < len(tensors)
        save_file(kept, path / folder.WEIGHTS)

    return damage


def truncate(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no document": (lambda path: (path / folder.DOCUMENT).unlink(), "holds no model of adamerge"),
    "half a document": (truncate(folder.DOCUMENT), "adamerge.json is damaged"),
    "a list": (lambda path: (path / folder.DOCUMENT).write_text("[1]"), "adamerge.json is damaged"),
    "binary": (lambda path: (path / folder.DOCUMENT).write_bytes(b"\xff\xfe"), "adamerge.json is damaged"),
    "no version": (change_document(lambda d: d.pop("schema_version")), "adamerge.json is damaged"),
    "a version in words": (change_document(lambda d: d.update(schema_version="two")), "is damaged"),
    "a newer version": (
        change_document(lambda d: d.update(schema_version=4)),
        r"was written by a newer adamerge \(schema 4\).\nUpdate adamerge",
    ),
    "no kind": (change_document(lambda d: d.pop("kind")), "is damaged: kind is None"),
    "no tasks": (change_document(lambda d: d.pop("tasks")), "is damaged: tasks are no list of names"),
    "an unknown routing": (
        change_document(lambda d: d["routing"].update(kind="Oracel")),
        "there is no routing 'Oracel'.\nUpdate adamerge",
    ),
    "no routing at all": (
        change_document(lambda d: d["routing"].update(kind="Learned")),
        "there is no routing 'Learned'",
    ),
    "an unknown option": (change_document(lambda d: d["routing"]["options"].update(depth=3)), "is damaged"),
    "an unknown block": (
        change_document(lambda d: next(iter(d["blocks"].values())).update(kind="Path")),
        "is damaged: KeyError 'Path'",
    ),
    "no weights": (lambda path: (path / folder.WEIGHTS).unlink(), "model"),
    "half of the weights": (truncate(folder.WEIGHTS), "model"),
    "no head": (without_tensor("heads/bars/weight"), "is damaged"),
    "no shared tensor": (without_tensor("shared/visual.proj"), "lack 1 tensors .* asks for: visual.proj"),
    "no expert": (without_tensor("resblocks.0.mlp.c_fc.weight/left"), "is damaged"),
    "no router": (without_tensor("router/"), "is damaged"),
}


class TestLoading:
    @pytest.mark.parametrize("name", DAMAGES)
    @pytest.mark.usefixtures("unchecked")
    def test_damages_are_told(self, clip: Path, base: Path, tmp_path: Path, name: str) -> None:
        damage, message = DAMAGES[name]
        mixture = make_mixture(clip, Router(), CODECS["low_rank"], exclude=("visual.conv1*",))
        saved = save_mixture(mixture, tmp_path / "model", like=base)
        damage(saved)
        with pytest.raises((InputError, DataError), match=message) as caught:
            load(saved)
        assert str(saved) in str(caught.value) or "there is no routing" in message

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"model: .*at all does not exist; .* holds nothing"):
            load(tmp_path / "nothing" / "here" / "at all")

    def test_a_checkpoint_is_no_model(self, clip: Path) -> None:
        for path in (clip / "base", clip / "experts" / "bars.safetensors"):
            with pytest.raises(InputError, match="holds no model of adamerge"):
                load(path)
