"""Code of a model folder never runs, whatever the folder asks for, whatever standard input says."""

import ast
import builtins
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import old_runs
import pytest
from builders import write_benchmark
from conftest import TASKS
from tiny_networks import make_hf, texts, write_hf, write_timm

import adamerge
from adamerge import TaskSpec, open_backbone, open_heads
from adamerge.checkpoints.foreign_code import code_requests
from adamerge.cli import main
from adamerge.errors import InputError
from adamerge.models.hf_encoder import HFEncoder
from adamerge.models.libraries import open_clip_model, open_clip_tokenizer, transformers_config
from adamerge.models.open_clip import OpenClipBackbone
from adamerge.models.timm import TimmBackbone

PACKAGE = Path(adamerge.__file__).parent
INTERPRETER = "checkpoints/unpickling.py"  # reads pickles with an unpickler of its own that calls nothing
LIBRARIES = "models/libraries.py"  # the one file that may call what reads a folder by a library
OPENERS = {
    *("from_pretrained", "from_config", "create_model", "create_model_and_transforms", "get_tokenizer"),
    *("create_model_from_pretrained", "load_dataset", "load_dataset_builder", "pipeline", "get_kernel"),
    *("get_peft_model", "load_state_dict_from_url", "hf_hub_download"),
}
RUNNERS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code", "imp"}
SPEC = {"one": TaskSpec("memory", None, ["a", "b"])}


class Yes(io.StringIO):
    """Standard input that says yes to all, and remembers that it was asked."""

    asked = 0

    def readline(self, *_: Any) -> str:
        self.asked += 1
        return "y\n"

    read = readline


@pytest.fixture(autouse=True)
def consent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Say yes on standard input, and check that nobody asks."""
    said = Yes()
    monkeypatch.setattr(sys, "stdin", said)
    monkeypatch.setattr(builtins, "input", lambda *_: said.readline())
    yield said
    assert said.asked == 0


def change(file: Path, *keys: str, value: Any) -> None:
    """Set one setting of a JSON file, which may not exist yet."""
    document = json.loads(file.read_text()) if file.exists() else {}
    place = document
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    file.write_text(json.dumps(document))


def plant(folder: Path) -> Path:
    """Put a Python file into a folder, and give the file that it would write."""
    mark = folder.parent / f"{folder.name} ran"
    lines = [f"open({str(mark)!r}, 'w').write('code of the folder ran')", "class Evil: pass"]
    for name in ("evil.py", "modeling_evil.py", "__init__.py", "open_clip.py"):
        (folder / name).write_text("\n".join(lines))
    return mark


HF_REQUESTS: dict[str, Callable[[Path], None]] = {
    "config": lambda f: change(f / "config.json", "auto_map", value={"AutoConfig": "evil.Evil"}),
    "image processor": lambda f: change(
        f / "preprocessor_config.json", "auto_map", value={"AutoImageProcessor": "evil.Evil"}
    ),
    "deep": lambda f: change(
        f / "config.json", "vision_config", "auto_map", value={"AutoModel": "evil.Evil"}
    ),
    "kernel": lambda f: change(f / "config.json", "attn_implementation", value="evil/kernel"),
    "paged": lambda f: change(f / "config.json", "attn_implementation", value="paged|evil/kernel"),
    "kernels": lambda f: change(f / "config.json", "_attn_implementation", value={"": "evil/kernel@v1:f"}),
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face base with experts, images and finished runs, as the current folder."""
    root = old_runs.unpack(tmp_path)
    monkeypatch.chdir(root)
    return root


def _report() -> str:
    """Read what `adamerge inspect` wrote, if it was run."""
    file = Path("inspected/inspect.md")
    return file.read_text() if file.exists() else ""


def commands(model: str) -> dict[str, list[str]]:
    """Give a command line of every command that opens models."""
    experts = [f"--experts=one={model}", "--experts=two=expert_two"]
    return {
        "fit": ["fit", "--config", "benchmark.yaml", "--run_dir", "run", "--trainer.max_steps", "1"],
        "validate": ["validate", "--config", "benchmark.yaml", "--run_dir", "static"],
        "bench": ["bench", "run", "benchmark.yaml", "--methods", "average", "--out", "bench"],
        "merge": ["merge", "average", "--base", "base", *experts, "--out", "merged"],
        "inspect": ["inspect", "--base", "base", *experts, "--out", "inspected"],
        "compress": ["compress", "--base", "base", "--expert", model, "--out", "compressed"],
        "evolve": ["evolve", "benchmark.yaml", "--generations", "1", "--out", "evolved"],
        "data check": ["data", "check", "--benchmark", "benchmark.yaml"],
        "predict": [
            "predict",
            "--model",
            "static/merged",
            "--data",
            "images_one/test",
            "--out",
            "found.parquet",
        ],
        "verify": ["verify", "static"],
        "reproduce": ["reproduce", "static"],
        "resume": [
            "fit",
            "--config",
            "static/config.yaml",
            "--ckpt_path",
            "last",
            "--trainer.max_steps",
            "3",
        ],
    }


@pytest.mark.filterwarnings("ignore", "default::adamerge.errors.AdamergeWarning")
@pytest.mark.parametrize("command", commands(""))
def test_no_command_runs_code_of_base_or_expert(
    command: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks = [plant(world / name) for name in ("base", "expert_one", "static", "images_one/adapt")]
    shutil.copytree(world / "base", world / "plain")
    for ask in HF_REQUESTS.values():
        for name in ("base", "expert_one", "static/merged"):
            ask(world / name)
    code = main(commands("expert_one")[command])
    told = capsys.readouterr()
    assert not any(mark.exists() for mark in marks)
    assert "Traceback" not in told.err
    assert not [p for name in ("run", "bench", "merged", "evolved") for p in Path(name).rglob("*.py")]
    if command == "data check":
        assert code == 0
        return
    assert code == 2, told.err
    if command != "verify":  # what is beside the run's files is not its business
        told = " ".join((told.out + told.err + _report()).split())
        assert "asks for code of its own" in told


@pytest.mark.filterwarnings("default::adamerge.errors.AdamergeWarning")
@pytest.mark.parametrize("command", ["merge", "inspect", "compress"])
def test_a_model_that_no_library_knows_is_merged_by_its_tensors(
    command: str, world: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    marks = [plant(world / name) for name in ("base", "expert_one")]
    for name in ("base", "expert_one", "expert_two"):
        change(world / name / "config.json", "model_type", value="evil")
        HF_REQUESTS["config"](world / name)
    assert main(commands("expert_one")[command]) == 0
    told = " ".join([*capsys.readouterr(), _report(), *(str(warning.message) for warning in recwarn)])
    assert "neither run nor copied: config.json: auto_map" in " ".join(told.split())
    assert not any(mark.exists() for mark in marks)
    assert not [path for name in ("merged", "inspected") for path in Path(name).rglob("*.py")]


@pytest.mark.parametrize("request_", HF_REQUESTS)
def test_every_opener_of_python_refuses_by_file_and_key(request_: str, world: Path) -> None:
    mark = plant(world / "base")
    HF_REQUESTS[request_](world / "base")
    (asked,) = code_requests(world / "base")
    for opener in (
        lambda: open_backbone(world / "base"),
        lambda: open_heads(world / "base", SPEC),
        lambda: HFEncoder(world / "base"),
        lambda: transformers_config(world / "base"),
    ):
        with pytest.raises(InputError, match="asks for code of its own, which is never run: ") as error:
            opener()
        assert asked in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["static", "routed"])
def test_a_merged_folder_is_asked_likewise(kind: str, world: Path) -> None:
    folder = world / kind / "merged"
    mark = plant(folder)
    HF_REQUESTS["image processor"](folder)
    with pytest.raises(InputError, match=r"preprocessor_config\.json: auto_map is"):
        adamerge.load(folder)
    assert not mark.exists()


TEXT_REQUESTS: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "tokenizer": ("tokenizer_config.json", ("auto_map",), {"AutoTokenizer": ["evil.Evil", None]}),
    "model": ("config.json", ("auto_map",), {"AutoModel": "evil.Evil"}),
    "sentences": ("sentence_bert_config.json", ("model_args",), {"trust_remote_code": True}),
    "processor": ("processor_config.json", ("auto_map",), {"AutoProcessor": "evil.Evil"}),
}


@pytest.mark.parametrize("name", TEXT_REQUESTS)
def test_text_models_that_ask_for_code(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    write_hf(folder, make_hf(texts("Bert")))
    mark = plant(folder)
    file, keys, value = TEXT_REQUESTS[name]
    change(folder / file, *keys, value=value)
    with pytest.raises(InputError, match=file.replace(".", r"\.")):
        open_backbone(folder)
    assert not mark.exists()


def test_modules_of_a_sentence_encoder_are_the_librarys(tmp_path: Path) -> None:
    folder = tmp_path / "sentences"
    write_hf(folder, make_hf(texts("Bert")))
    mark = plant(folder)
    parts = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    parts += [{"idx": 1, "path": "1_Pooling", "type": "evil.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(parts))
    with pytest.raises(InputError, match=r'modules\.json: 1\.type is "evil\.Pooling"'):
        open_backbone(folder)
    assert not mark.exists()


OPEN_CLIP_REQUESTS: dict[str, tuple[tuple[str, ...], Any]] = {
    "asks for code of its own": (("text_cfg", "tokenizer_kwargs"), {"trust_remote_code": True}),
    "tokenizer_kwargs asks for code_revision": (("text_cfg", "tokenizer_kwargs"), {"code_revision": "x"}),
    "hf_model_name names another folder": (("text_cfg", "hf_model_name"), "./evil"),
    "timm_model_name names another model": (("vision_cfg", "timm_model_name"), "local-dir:./evil"),
}


@pytest.mark.parametrize("message", OPEN_CLIP_REQUESTS)
def test_open_clip_configurations_are_data(message: str, clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip / "base", tmp_path / "base"))
    mark = plant(folder)
    keys, value = OPEN_CLIP_REQUESTS[message]
    change(folder / "open_clip_config.json", "model_cfg", *keys, value=value)
    change(folder / "open_clip_config.json", "model_cfg", "text_cfg", "hf_tokenizer_name", value="x")
    for opener in (
        lambda: OpenClipBackbone(folder),
        lambda: open_backbone(folder),
        lambda: open_heads(folder, SPEC),
        lambda: open_clip_model(folder, load_weights=True),
        lambda: open_clip_tokenizer(folder),
    ):
        with pytest.raises(InputError, match=message):
            opener()
    assert not mark.exists()


def test_transformers_does_not_ask_where_open_clip_calls_it(clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip / "base", tmp_path / "base"))
    (tmp_path / "remote").mkdir()
    mark = plant(tmp_path / "remote")
    change(tmp_path / "remote" / "config.json", "model_type", value="evil")
    change(tmp_path / "remote" / "config.json", "auto_map", value={"AutoConfig": "evil.Evil"})
    change(folder / "open_clip_config.json", "model_cfg", "text_cfg", "hf_model_name", value="owner/name")
    from transformers import AutoConfig

    from adamerge.models import libraries

    with libraries._no_questions(), pytest.raises(ValueError, match="custom code"):
        AutoConfig.from_pretrained(tmp_path / "remote")  # as open_clip does, which says nothing of trust
    assert not mark.exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architecture", "hf-hub:evil/model", "architecture names another model"),
        ("architecture", "local-dir:evil", "architecture names another model"),
        ("model_args", {"checkpoint_path": "evil.pt"}, "model_args asks for other files or models"),
        ("model_args", {"pretrained_custom_load": True}, "model_args asks for other files or models"),
    ],
)
def test_timm_configurations_are_data(key: str, value: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_timm(folder, "vit")
    mark = plant(folder)
    change(folder / "config.json", key, value=value)
    for opener in (TimmBackbone, open_backbone):
        with pytest.raises(InputError, match=message):
            opener(folder)
    assert not mark.exists()


def test_harmless_words_are_no_requests(tmp_path: Path) -> None:
    document = {"auto_map": {}, "trust_remote_code": False, "attn_implementation": "sdpa", "note": "auto_map"}
    document |= {"auto_mapping": {"base_model_class": "CLIPVisionModel", "parent_library": "transformers"}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert code_requests(tmp_path) == []
    assert code_requests(tmp_path / "config.json") == []


def test_a_python_file_beside_weights_is_not_copied(clip: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(clip / "base", tmp_path / "base"))
    mark = plant(base)
    experts = [f"--experts={task}={clip / 'experts' / f'{task}.safetensors'}" for task in TASKS]
    out = tmp_path / "out"
    assert main(["merge", "average", "--base", str(base), *experts, "--out", str(out)]) == 0
    benchmark = write_benchmark(tmp_path, clip, {})
    assert benchmark.exists()
    assert (out / "open_clip_config.json").exists()
    assert not [*out.rglob("*.py")]
    assert not mark.exists()


def _calls() -> list[tuple[str, ast.Call, str]]:
    """List all calls of the package: the file, the call and the name that is called."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                found.append((file.relative_to(PACKAGE).as_posix(), node, name))
    return found


def _keyword(call: ast.Call, name: str) -> Any:
    return next((k.value.value for k in call.keywords if k.arg == name and hasattr(k.value, "value")), None)


def test_one_file_calls_what_reads_folders_by_a_library() -> None:
    openers = {(file, name) for file, _, name in _calls() if name in OPENERS and file != LIBRARIES}
    assert openers == set(), f"call it through adamerge/{LIBRARIES}"


def test_no_file_runs_or_unpickles_anything() -> None:
    for file, call, name in _calls():
        place = f"{file}:{call.lineno}"
        owner = getattr(getattr(call.func, "value", None), "id", "")
        assert not (isinstance(call.func, ast.Name) and name in RUNNERS), place
        if name == "load" and owner == "torch":
            assert _keyword(call, "weights_only") is True, place
        if name == "load" and owner in ("np", "numpy"):
            assert _keyword(call, "allow_pickle") in (None, False), place
        assert (owner, name) not in {("yaml", "unsafe_load"), ("yaml", "full_load")}, place
        if (owner, name) == ("yaml", "load"):  # the second argument is a subclass of SafeLoader
            assert ast.unparse(call.args[1]) == "_Strict", place
        is_users_own = file == "fitting/classes.py"  # the classes that a user's configuration names
        if name in ("import_module", "spec_from_file_location") and not is_users_own:
            assert ast.unparse(call.args[0]).startswith("f'adamerge."), place


def test_no_file_imports_a_module_that_unpickles() -> None:
    for file in (path for path in PACKAGE.rglob("*.py") if path != PACKAGE / INTERPRETER):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert PICKLES.isdisjoint(name.partition(".")[0] for name in names), file
