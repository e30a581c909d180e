"""A damaged folder ends in one error of ours before anything runs: sixty mutations of either kind."""

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import old_runs
import pytest
import torch
from safetensors.torch import load_file, save_file

import adamerge
from adamerge.cli import main
from adamerge.digests import file_digest
from adamerge.errors import AdamergeError, InputError

SEEDS = range(60)
VALUES: list[Any] = [None, 0, -1, 3, 2.5, True, "", "x", [], [1], {}, {"x": 1}, [[]], "1e999", 10**30]
Damage = Callable[[Path, random.Random], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole folders `static` and `routed`, as this version writes them."""
    root = old_runs.unpack(tmp_path_factory.mktemp("whole"))
    for kind in ("static", "routed"):
        folder = root / kind / "merged"
        saved = root.parent / kind
        if kind == "routed":
            adamerge.save_mixture(adamerge.load(folder), saved, like=root / "base")
            continue
        shutil.copytree(folder, saved)
        document = json.loads((saved / "adamerge.json").read_text())
        names = [p.name for p in saved.iterdir() if p.suffix in (".safetensors", ".json")]
        rows = {name: file_digest(saved / name) for name in names if name != "adamerge.json"}
        (saved / "adamerge.json").write_text(json.dumps(document | {"files": rows}))
    return root.parent


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths to all parts of a document."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, part in pairs for found in ((*path, key), *places(part, (*path, key)))]


def change_document(folder: Path, draw: random.Random) -> None:
    """Replace, remove or repeat one part of adamerge.json or config.json."""
    file = folder / draw.choice(["adamerge.json", "adamerge.json", "adamerge.json", "config.json"])
    document = json.loads(file.read_text())
    document.pop("files", None)  # what else is checked is asked here
    document.pop("digest", None)
    found = [path for path in places(document) if path[0] not in ("provenance", "code")]
    *parents, last = draw.choice(found)
    place = document
    for key in parents:
        place = place[key]
    if draw.random() < 0.3:
        del place[last]
    else:
        place[last] = draw.choice(VALUES)
    file.write_text(json.dumps(document))


def change_tensor(folder: Path, draw: random.Random) -> None:
    """Give one tensor another shape, dtype, name, or values that are not finite."""
    unseal(folder)
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(file)
    name = draw.choice([n for n in sorted(tensors) if n.startswith("heads/")] or sorted(tensors))
    name = name if draw.random() < 0.5 else draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: tensors.update({f"{name}x": tensor}),
        lambda: tensors.update({name: tensor[..., :-1] if tensor.dim() else tensor[None]}),
        lambda: tensors.update({name: tensor[:-1] if tensor.dim() else tensor[None]}),
        lambda: tensors.update({name: tensor[None]}),
        lambda: tensors.update({name: tensor.to(torch.int64)}),
        lambda: tensors.update({name: tensor.to(torch.bool)}),
        lambda: tensors.update({name: tensor.half()}),
        lambda: tensors.update({name: torch.full_like(tensor.float(), torch.nan)}),
        lambda: tensors.update({name: torch.empty(0)}),
        lambda: tensors.update({name: tensor.to(torch.complex64)}),
    ]
    draw.choice(changes)()
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})


def change_file(folder: Path, draw: random.Random) -> None:
    """Damage a file as a disk does, or put something else in its place."""
    file = draw.choice(sorted(path for path in folder.iterdir() if path.name != "README.md"))
    content = file.read_bytes()
    at = draw.randrange(len(content))
    file.unlink()
    changes: list[Callable[[], object]] = [
        lambda: None,
        file.mkdir,
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(content[:at]),
        lambda: file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]),
        lambda: file.write_bytes(content[:at] + b"\xff\xfe\x00" + content[at:]),
        lambda: file.write_text("[" * 200_000),
        lambda: file.write_text('{"a":' * 100_000),
        lambda: file.write_text(json.dumps([json.loads("1")])),
        lambda: file.symlink_to(file.parent / "nothing"),
        lambda: file.symlink_to(file),
    ]
    draw.choice(changes)()


def unseal(folder: Path) -> None:
    """Take the digests away, as older versions wrote none."""
    file = folder / "adamerge.json"
    document = json.loads(file.read_text())
    for name in ("files", "digest"):
        document.pop(name, None)
    file.write_text(json.dumps(document))


def predicted(folder: Path) -> torch.Tensor:
    images = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16) % 251
    return adamerge.load(folder).predict(images.to(torch.uint8)).probability


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", ["static", "routed"])
def test_sixty_mutations_end_in_an_error_of_ours_or_change_nothing(
    kind: str, folders: Path, tmp_path: Path
) -> None:
    kinds: list[Damage] = [change_document, change_tensor, change_file]
    expected, refused = predicted(folders / kind), dict[int, str]()
    for seed in SEEDS:
        draw = random.Random(seed)
        folder = Path(shutil.copytree(folders / kind, tmp_path / str(seed)))
        damage = kinds[seed % 3]
        damage(folder, draw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = predicted(folder)
            except AdamergeError as error:
                refused[seed] = str(error)
                continue
        if damage is change_file:  # its own digests tell, or nothing reads what changed
            assert torch.equal(found, expected), seed
        shutil.rmtree(folder)
    assert len(refused) > 35
    assert not [text for text in refused.values() if len(text.splitlines()) > 3 or len(text) > 1500]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [4, 7, 8])
def test_the_command_says_the_same(
    seed: int, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(folders / "routed", tmp_path / "model"))
    [change_document, change_tensor, change_file][seed % 3](folder, random.Random(seed))
    data, out = folders / "old_runs" / "images_one" / "test", tmp_path / "x.parquet"
    assert main(["predict", "--model", str(folder), "--data", str(data), "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert len(told.strip().splitlines()) <= 3
    assert not out.exists()


@pytest.mark.parametrize("kind", ["static", "routed"])
def test_any_changed_file_is_named(kind: str, folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / kind, tmp_path / kind))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(InputError, match=r"not as written \(SHA-256\): config\.json"):
        adamerge.load(folder)


def test_a_changed_part_of_the_document_is_told(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "routed", tmp_path / "routed"))
    document = json.loads((folder / "adamerge.json").read_text())
    document["tasks"] = document["tasks"][::-1]
    (folder / "adamerge.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"adamerge\.json is not as it was written"):
        adamerge.load(folder)
    document["tasks"] = document["tasks"][::-1]
    document["classes"] = {"one": ["cat", "dog"], "two": ["c0", "c1"]}  # other words change no result
    (folder / "adamerge.json").write_text(json.dumps(document))
    assert adamerge.load(folder).classes["one"] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("heads/one/weight", lambda x: x[:, :-1], "reads 7 dimensions, the features have 8"),
        ("heads/one/weight", lambda x: x.long(), "a head has dtype torch.int64"),
        ("heads/one/weight", lambda x: x * torch.nan, "weight of the head of 'one' is not finite"),
        ("heads/one/weight", lambda x: x[0], r"has 8 rows for 2 classes"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_heads_fit_the_features(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, folders: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders / "static", tmp_path / "static"))
    unseal(folder)
    heads = load_file(folder / "heads.safetensors")
    save_file(heads | {name: change(heads[name]).contiguous()}, folder / "heads.safetensors")
    with pytest.raises(InputError, match=message):
        adamerge.load(folder)
