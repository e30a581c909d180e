"""Hub ids, without a hub: `snapshot_download` is replaced where it would be reached."""

import pickle
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from adamerge import hub
from adamerge.checkpoints import hub as model_hub
from adamerge.checkpoints import open_checkpoint
from adamerge.errors import AdamergeWarning, EnvironmentProblem, InputError


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.parametrize("text", ["openai/clip-vit-base-patch32", "Qwen/Qwen2.5-7B", "a/b.c"])
def test_hub_ids(text: str) -> None:
    assert hub.is_hub_id(text)


@pytest.mark.parametrize("text", ["model", "./a/b", "/a/b", "a/b/c", "runs/cars.safetensors", "runs/cars.pt"])
def test_paths(text: str) -> None:
    assert not hub.is_hub_id(text)


@pytest.mark.usefixtures("unreachable")
def test_without_network_one_line_tells_the_local_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match=r"no local path .* \(the hub cannot be reached\)") as caught:
        open_checkpoint("nobody/nothing", role="base")
    assert caught.value.exit_code == 5
    assert str(caught.value).splitlines()[1] == "Download it elsewhere and give the path of the local folder."
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.usefixtures("unreachable")
def test_a_cached_model_needs_no_network(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def cached(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(clip / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert open_checkpoint("owner/name").root == clip / "base"
    assert asked["repo_id"] == "owner/name"
    assert asked["local_files_only"] is True
    assert "*.bin" not in asked["allow_patterns"]


def test_an_id_that_the_hub_does_not_know_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(*_args: object, **_options: object) -> None:
        raise LocalEntryNotFoundError("no such repository")

    monkeypatch.setattr(hub, "reachable", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_found)
    with pytest.raises(EnvironmentProblem, match="LocalEntryNotFoundError"):
        model_hub.fetch("owner/name", "base")


def test_reaching_tries_a_socket_unless_a_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert hub.reachable(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert not hub.reachable("http://127.0.0.1:9", seconds=0.2)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert hub.reachable("http://127.0.0.1:9")


def test_a_path_that_looks_like_no_hub_id_never_asks_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_hub, "fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="does not exist"):
        open_checkpoint("runs/missing.safetensors")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models/carz", "models holds cars, birds"),
        ("models/a/b", "models holds "),
        ("./carz", "this folder holds models"),
        ("carz", "this folder holds models"),
        ("/carz", "/ holds "),
        ("nobody/here/carz", "this folder holds models"),
        ("~/carz", "'~' is not expanded here"),
    ],
)
def test_of_a_path_that_does_not_exist_its_neighbours_are_told(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("birds", "cars", ".hidden"):
        (tmp_path / "models" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_hub, "fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InputError) as caught:
        model_hub.locate(text, "expert 'birds'")
    assert str(caught.value).startswith(f"expert 'birds': {text} does not exist")
    assert told in str(caught.value)


def test_of_many_neighbours_the_nearest_eight_are_told(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"cars{i}").touch()
    problem, hint = hub.nowhere(str(tmp_path / "cars12")) or ("", "")
    assert "holds cars1, cars2, " in problem
    assert problem.endswith(" and 4 more.")
    assert hint == ""


def test_where_a_folder_has_an_owners_name_the_hub_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.nowhere("openai/clip") is None
    (tmp_path / "openai").mkdir()
    told = (
        "openai/clip does not exist; openai holds nothing.",
        "The hub is asked only where there is no folder openai.",
    )
    assert hub.nowhere("openai/clip") == told


def test_a_repository_without_safetensors_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tensor = tmp_path / "old", torch.arange(3.0)
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "1_Pooling/config.json"):
        (folder / name).write_text("{}")
    asked: list[list[str]] = []

    def cached(_repo_id: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        if "pytorch_model.bin" in allow_patterns:
            torch.save({"w": tensor}, folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    monkeypatch.setattr(hub, "reachable", lambda _: True)
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    with pytest.warns(AdamergeWarning, match="owner/name has no safetensors: pytorch_model.bin is converted"):
        found = open_checkpoint("owner/name", role="owner/name")
    assert torch.equal(found["w"], tensor)
    made = sorted(str(path.relative_to(found.root)) for path in found.root.rglob("*.*"))
    assert made == ["1_Pooling/config.json", "config.json", "model.safetensors"]
    assert open_checkpoint("owner/name").root == found.root  # and does not warn again
    (folder / "config.json").write_text('{"hidden_act": "gelu"}')  # the same weights are another model now
    with pytest.warns(AdamergeWarning, match="is converted"):
        assert open_checkpoint("owner/name").root != found.root
    assert "pytorch_model.bin" not in asked[0]


def test_a_repository_that_asks_for_more_than_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(eval))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    with pytest.warns(AdamergeWarning), pytest.raises(InputError, match="builtins.eval"):
        open_checkpoint("owner/name")
