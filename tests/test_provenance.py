"""Where a result comes from, and what may change before it is another result."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import adamerge
from adamerge.errors import InputError
from adamerge.provenance import (
    SCHEMA_VERSION,
    changed_files,
    code_version,
    model_card,
    require_same_inputs,
    write_manifest,
)
from adamerge.results import make_row

INPUTS = {
    "schema_version": SCHEMA_VERSION,
    "config": {"lr": 1e-3, "trainer": {"max_steps": 10}},
    "weights": {"base": "aa", "cars": "bb"},
    "code": {"source": "11"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    inputs = json.loads(json.dumps(INPUTS))
    *parents, last = path.split(".")
    place = inputs
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = value
    return inputs


def test_the_code_version_names_what_computes() -> None:
    version = code_version()
    assert version["adamerge"] == adamerge.__version__
    assert len(version["source"]) == 64
    assert {"torch", "pytorch-lightning", "open_clip_torch"} <= set(version)


@pytest.mark.parametrize(
    ("path", "value"), [("config.trainer.max_steps", 99), ("code.source", "22"), ("code.torch", "3")]
)
def test_more_steps_and_another_code_version_may_resume(path: str, value: object) -> None:
    require_same_inputs(INPUTS, changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("config.lr", 0.1, "config.lr: 0.001 before, 0.1 now"),
        ("weights.cars", "cc", "weights.cars: 'bb' before, 'cc' now"),
        ("config.clamp", "on", "config.clamp: None before, 'on' now"),
    ],
)
def test_other_inputs_may_not(path: str, value: object, told: str) -> None:
    with pytest.raises(InputError) as caught:
        require_same_inputs(INPUTS, changed(path, value))
    assert told in str(caught.value)
    assert "--resume_anyway true" in str(caught.value)


def test_a_run_of_another_schema_is_told_what_to_do() -> None:
    with pytest.raises(InputError, match="written in schema 0, here it is 1.\nResume it with the version"):
        require_same_inputs(changed("schema_version", 0), INPUTS)


def test_a_finished_run_is_verified_file_by_file(tmp_path: Path) -> None:
    for name in ("a.txt", "merged/model.bin", "wandb/log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    (tmp_path / "wandb" / "log").write_text("W&B goes on writing")
    assert changed_files(tmp_path) == []
    (tmp_path / "a.txt").write_text("other")
    (tmp_path / "merged" / "model.bin").unlink()
    assert changed_files(tmp_path) == ["a.txt: changed", "merged/model.bin: missing"]


def test_a_folder_without_manifest_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no manifest\.json\.\nOnly a finished run"):
        changed_files(tmp_path)


def test_the_model_card_is_front_matter_and_text() -> None:
    config = {"method": "ties", "coefficients": {"clamp": "off"}, "note": "a: b"}
    sources = {"base": "owner/base", "cars": "owner/cars", "digits": "x y.safetensors"}
    digests = {name: name[0] * 64 for name in sources}
    card = model_card(sources, digests, config, make_row("ties", {"cars": 80.0, "digits": 90.0}))
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "tags": ["merge", "adamerge"],
        "base_model": ["owner/base", "owner/cars"],
        "base_model_relation": "merge",
    }
    assert f"- digits: `x y.safetensors` (SHA-256 `{'d' * 64}`)" in text
    assert "| ties | 80.0 | 90.0 | 85.0 | - |" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == config
    assert "accuracy" not in model_card(sources, digests, config)
    assert "correction of each task's features" not in card
    assert "correction of each task's features" in model_card(sources, digests, config, adapted=True)


DETAILS = {
    "experts": ["cars", "digits"],
    "routing": {"cars": [0.75, 0.25], "digits": [0.0, 1.0]},
    "baselines": {"oracle": {"cars": 90.0, "digits": 95.0}, "shared": {"cars": 50.0, "digits": 60.0}},
    "stored": {"shared": {"scalars": 1000, "n_bytes": 4000}, "router": {"scalars": 5, "n_bytes": 20}},
    "seconds_per_batch": {"shared": 0.1, "mixture": 0.125},
}


class TestCardsOfRoutedModels:
    def card(self, **details: Any) -> str:
        row = make_row("twin", {"cars": 80.0, "digits": 90.0}, details=details)
        return model_card({}, {}, {"method": "twin"}, row, routed=True)

    def test_the_card_is_the_same_before_evaluation_but_for_results(self) -> None:
        before = model_card({}, {}, {"method": "twin"}, routed=True)
        titles = [line for line in before.splitlines() if line.startswith("#")]
        assert titles == [f"# Merged by adamerge {adamerge.__version__}: twin", "## Configuration"]
        for card in (before, self.card(**DETAILS)):
            assert 'model = adamerge.load("FOLDER")' in card
            assert "static" not in card

    def test_baselines_stand_beside_the_router_and_are_explained(self) -> None:
        card = self.card(**DETAILS)
        assert "| twin | 80.0 | 90.0 | 85.0 | - |\n| oracle | 90.0 | 95.0 | 92.5 | - |\n| shared |" in card
        assert "- oracle: the true task's expert\n- shared: the shared model alone\n" in card
        assert "- uniform" not in card

    def test_routing_bytes_and_latency_are_told(self) -> None:
        card = self.card(**DETAILS)
        assert "| images of | cars | digits |\n| --- | ---: | ---: |\n| cars | 0.75 | 0.25 |\n" in card
        assert "| shared | 1,000 | 4,000 |\n| router | 5 | 20 |\n| sum | 1,005 | 4,020 |\n" in card
        assert "add 25.0 ms to a batch: 125.0 ms instead of 100.0 ms" in card

    def test_what_was_not_measured_is_left_out(self) -> None:
        card = self.card(experts=["cars"], routing={}, baselines={}, stored=DETAILS["stored"])
        titles = [line for line in card.splitlines() if line.startswith("## ")]
        assert titles == ["## Top-1 accuracy, %", "## Stored", "## Configuration"]
        assert "- oracle" not in card
