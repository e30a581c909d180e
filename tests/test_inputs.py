"""What decides a result is recorded with a run: changed, it refuses to resume and fails `verify`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import old_runs
import pytest
import torch

import adamerge
from adamerge.checkpoints.settings import settings_digest, settings_files, settings_of
from adamerge.cli import main
from adamerge.errors import AdamergeWarning
from adamerge.provenance import INPUTS, read_inputs, require_same_inputs

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # runs are copied here
FIT = ["fit", "--config", "benchmark.yaml", "--method", "adaptive", "--run_dir", "run"]
FIT += ["--model.coefficients", "adamerge.Learned", "--model.decay", "none"]  # which allows more steps
FIT += ["--evaluate_experts", "false", "--trainer.max_steps"]
RESUME = ["3", "--ckpt_path", "last"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of models, images and a finished run of two steps."""
    root = old_runs.unpack(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main([*FIT, "2"]) == 0
    return root


@pytest.fixture
def world(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That world, for a test to change, in a folder of its own."""
    root = Path(shutil.copytree(finished, tmp_path / "world"))
    inputs = read_inputs(root / "run") | {"folder": str(root)}
    (root / "run" / INPUTS).write_text(json.dumps(inputs))
    monkeypatch.chdir(root)
    return root


def change(file: str, **settings: Any) -> Callable[[], None]:
    """Set keys of a JSON file in base and experts."""

    def apply() -> None:
        for model in ("base", "expert_one", "expert_two"):
            path = Path(model, file)
            document = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(document | settings))

    return apply


CHANGES: dict[str, Callable[[], None]] = {
    "files.base.config.json.hidden_act: 'gelu' before, 'quick_gelu' now": change(
        "config.json", hidden_act="quick_gelu"
    ),
    "files.base.config.json.num_attention_heads: 2 before, 4 now": change(
        "config.json", num_attention_heads=4
    ),
    "files.base.config.json.layer_norm_eps: 1e-05 before, 1e-06 now": change(
        "config.json", layer_norm_eps=1e-6
    ),
    "preprocessor_config.json.resample: 3 before, 2 now": change("preprocessor_config.json", resample=2),
    "files.base.tokenizer_config.json.model_max_length: None before, 7 now": change(
        "tokenizer_config.json", model_max_length=7
    ),
}


@pytest.mark.parametrize("told", CHANGES)
def test_a_changed_setting_of_the_models_refuses_a_resume_and_fails_verify(
    told: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CHANGES[told]()
    assert main([*FIT, *RESUME]) == 2
    assert told in capsys.readouterr().err.replace("\n", " ")
    assert main(["verify", "run"]) == 2
    assert told.removeprefix("files.") in capsys.readouterr().err
    assert main([*FIT, *RESUME, "--resume_anyway", "true"]) == 0


def test_other_contents_of_long_files_are_told_by_name(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("expert_two", "vocab.txt").write_text("a\nb\n")
    assert main([*FIT, *RESUME]) == 2
    assert "files.two.vocab.txt: None before, 'sha256 " in capsys.readouterr().err


def test_a_head_file_of_other_values_refuses_a_resume(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy("head_two.safetensors", "head_one.safetensors")
    assert main([*FIT, *RESUME]) == 2
    assert "data.one head" in capsys.readouterr().err


def test_what_decides_nothing_may_change(world: Path) -> None:
    change("config.json", transformers_version="1.0", _name_or_path="elsewhere")()
    for name in ("trainer_state.json", "generation_config.json", "README.md", "LICENSE.txt", "evil.py"):
        Path("base", name).write_text("{}")
    assert main([*FIT, *RESUME]) == 0


def test_other_versions_of_libraries_are_told(world: Path) -> None:
    inputs = read_inputs(Path("run"))
    inputs["code"] |= {"torch": "2.0.1", "pillow": "9.0"}
    inputs["preprocessing"] |= {"library": "transformers 4.0", "pillow": "9.0"}
    Path("run", INPUTS).write_text(json.dumps(inputs))
    with pytest.warns(AdamergeWarning, match=r"begun with torch 2\.0\.1 \(now .*, pillow 9\.0 \(now"):
        assert main([*FIT, *RESUME]) == 0


def test_versions_are_recorded_of_all_that_changes_numbers(finished: Path) -> None:
    code = read_inputs(finished / "run")["code"]
    assert {"torch", "torchvision", "transformers", "open_clip_torch", "timm", "tokenizers", "pillow"} < set(
        code
    )


def test_settings_are_recorded_by_key_and_long_ones_by_digest(tmp_path: Path) -> None:
    names = {str(i): "a long name of a class" for i in range(1000)}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": names, "act": "gelu", "part": {"a": 1}}))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"mode": "cls"}')
    (tmp_path / "tokenizer.json").write_text("[" * 10**5)
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    found = settings_of(tmp_path)
    assert found["1_Pooling/config.json"] == {"mode": "cls"}
    assert found["config.json"]["act"] == "gelu"
    assert found["config.json"]["part"] == {"a": 1}
    assert found["config.json"]["id2label"].startswith("sha256 ")
    assert found["tokenizer.json"].startswith("sha256 ")
    assert set(found) == {"1_Pooling/config.json", "config.json", "tokenizer.json", "chat_template.jinja"}
    before = settings_digest(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ y }}")
    assert settings_digest(tmp_path) != before
    assert settings_files(tmp_path / "config.json") == []


class TestOldRuns:
    """Runs of a version that recorded neither settings nor all libraries."""

    @pytest.fixture(autouse=True)
    def _world(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(old_runs.unpack(tmp_path))

    @pytest.mark.filterwarnings("ignore::UserWarning")  # what checkpoints say of folders that moved
    @pytest.mark.parametrize("kind", ["static", "routed"])
    def test_they_resume_verify_and_stand_in_tables(
        self, kind: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["verify", kind]) == 0
        assert main(["table", kind]) == 0
        resume = ["fit", "--config", f"{kind}/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "3"]
        assert main(resume) == 0, capsys.readouterr().err
        assert main(["verify", kind]) == 0
        assert "files" in read_inputs(Path(kind))

    @pytest.mark.parametrize("kind", ["static", "routed"])
    def test_their_models_load(self, kind: str) -> None:
        model = adamerge.load(Path(kind, "merged"))
        assert model.predict(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).probability.isfinite().all()

    @pytest.mark.filterwarnings("ignore:experts 'one' and 'two' are equal")
    @pytest.mark.parametrize("file", ["expert_one/model.safetensors", "head_one.safetensors"])
    def test_other_weights_and_heads_are_refused_as_before(
        self, file: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copy(file.replace("one", "two"), file)
        resume = ["fit", "--config", "static/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "3"]
        assert main(resume) == 2
        assert "this run cannot be resumed, its inputs changed" in capsys.readouterr().err


def test_an_older_run_is_not_asked_for_options_of_today() -> None:
    before: dict[str, Any] = {
        "schema_version": 1,
        "code": {"source": "old"},
        "weights": {"base": "a", "x": "b"},
    }
    before["config"] = {
        "model": {"base": "m", "experts": {"x": "e"}},
        "data": {"tasks": {"x": {"adapt": "d"}}},
    }
    now = json.loads(json.dumps(before)) | {"files": {"base": {"config.json": {"a": 1}}}}
    now["code"] = {"source": "new"}
    now["config"]["model"]["new_option"] = 3
    now["config"]["data"]["tasks"]["x"]["new_column"] = "c"
    require_same_inputs(before, now)
    for part, name in (("experts", "y"), ("tasks", "y")):
        more = json.loads(json.dumps(now))
        place = more["config"]["model"] if part == "experts" else more["config"]["data"]
        place[part][name] = "e" if part == "experts" else {"adapt": "d"}
        with pytest.raises(adamerge.InputError, match=rf"{part}\.y"):
            require_same_inputs(before, more)


def test_a_row_of_a_table_is_computed_again_after_a_changed_setting(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["bench", "run", "benchmark.yaml", "--methods", "average", "--out", "table"]
    for told in ("average: done\n", "average: done before\n"):
        assert main(run) == 0
        assert told in capsys.readouterr().err
    change("config.json", hidden_act="quick_gelu")()
    assert main(run) == 0
    assert "average: done before" not in capsys.readouterr().err
