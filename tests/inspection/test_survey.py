"""What the report says of base and experts, and that its problems are what a merge refuses."""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from adamerge.errors import AdamergeWarning, InputError
from adamerge.inspection import inspect
from adamerge.vectors import TaskVectors

State = dict[str, Tensor]
NAN = math.nan


def make_base() -> State:
    generator = torch.Generator().manual_seed(0)
    shapes = {"h.0.weight": (6, 4), "h.0.bias": (6,), "h.10.weight": (4, 6), "h.2.weight": (4, 4)}
    shapes |= {"scale": (), "embed.weight": (8, 4)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return state | {"head.weight": state["embed.weight"].clone(), "ids": torch.arange(3)}


def expert(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in make_base().items()
    }
    return state | {"head.weight": state["embed.weight"].clone()}


def test_a_sound_merge_has_no_problems_and_its_figures_are_those_of_the_vectors() -> None:
    base, experts = make_base(), {"cars": expert(1), "dogs": expert(2)}
    del experts["dogs"]["h.0.bias"]
    report = inspect(base, experts, allow_missing=["*.bias"])
    assert report.problems + report.notes + report.misfits + report.nonfinite == ()
    assert report.tied == {"head.weight": "embed.weight"}
    assert [(row.tensor, row.reason) for row in report.kept] == [("ids", "integer")]
    assert report.partial == {"h.0.bias": ("cars",)}
    assert report.same_base == {"cars": True, "dogs": True}
    names = [n for n in base if n not in ("ids", "head.weight")]
    flat = torch.stack(
        [
            torch.cat([(e.get(n, base[n]) - base[n]).double().flatten() for n in names])
            for e in experts.values()
        ]
    )
    whole = math.sqrt(sum(float(base[n].double().square().sum()) for n in names))
    found = report.vectors
    assert found is not None
    assert list(found.norm.values()) == pytest.approx(flat.norm(dim=1).tolist())
    assert list(found.relative_norm.values()) == pytest.approx((flat.norm(dim=1) / whole).tolist(), rel=1e-6)
    assert list(found.density.values()) == pytest.approx((flat != 0).double().mean(1).tolist())
    assert found.unchanged == {"cars": 0, "dogs": 1}
    assert found.cosine[0][1] == pytest.approx(float(torch.corrcoef(flat)[0, 1]), abs=0.1)
    assert found.cosine[0][1] == pytest.approx(float(flat[0] @ flat[1] / flat.norm(dim=1).prod()))


def test_blocks_are_in_natural_order_and_make_up_the_whole() -> None:
    found = inspect(make_base(), {"cars": expert(1), "dogs": expert(2)}).vectors
    assert found is not None
    assert [facts.block for facts in found.blocks] == ["embed", "h.0", "h.2", "h.10", "scale"]
    assert (
        sum(facts.entries for facts in found.blocks) == found.entries == 6 * 4 + 6 + 4 * 6 + 4 * 4 + 1 + 8 * 4
    )
    for task, norm in found.norm.items():
        assert math.hypot(*(facts.norm[task] or 0.0 for facts in found.blocks)) == pytest.approx(norm)


def test_ranks_are_means_over_the_matrices_that_a_task_changed() -> None:
    base, cars = make_base(), make_base()
    cars["h.0.weight"] = base["h.0.weight"] + torch.outer(torch.ones(6), torch.ones(4))
    found = inspect(base, {"cars": cars, "dogs": expert(2)}).vectors
    assert found is not None
    assert found.ranks is not None
    assert found.ranks.effective["cars"] == pytest.approx(1, rel=1e-3)  # of fp32 differences
    assert found.blocks[0].ranks is not None
    assert found.blocks[0].ranks.effective["cars"] is None
    alone = {row.tensor: row.ranks.effective["dogs"] for row in found.matrices}
    assert found.ranks.effective["dogs"] == pytest.approx(sum(alone.values()) / 4)
    quick = inspect(base, {"cars": cars, "dogs": expert(2)}, rank=False).vectors
    assert quick == replace(
        found, ranks=None, matrices=(), blocks=tuple(replace(facts, ranks=None) for facts in found.blocks)
    )


def fault(change: Callable[[State, State], object]) -> tuple[State, State]:
    base, bad = make_base(), expert(1)
    change(base, bad)
    return base, bad


FAULTS: dict[str, tuple[Callable[[State, State], object], str]] = {
    "missing": (lambda _, e: e.pop("h.0.bias"), "lacks 1 of 8 tensors: h.0.bias"),
    "unexpected": (lambda _, e: e.update(extra=torch.ones(2)), "has 1 tensors that the base lacks: extra"),
    "width": (lambda _, e: e.update({"h.0.weight": torch.ones(6, 5)}), r"h.0.weight [6, 5] vs base [6, 4]"),
    "float8": (lambda _, e: e.update(scale=e["scale"].to(torch.float8_e5m2)), "quantised tensors scale"),
    "int8": (lambda _, e: e.update({"h.0.bias": torch.ones(6).to(torch.int8)}), "quantised tensors h.0.bias"),
    "meta": (lambda _, e: e.update({"h.0.bias": torch.ones(6, device="meta")}), "meta device"),
    "base float8": (lambda b, _: b.update(scale=b["scale"].to(torch.float8_e5m2)), "base: quantised"),
    "nan": (lambda _, e: e["h.0.weight"][1, 2:].fill_(NAN), "expert 'bad': 1 tensors have non-finite values"),
    "inf in base": (lambda b, _: b["scale"].fill_(math.inf), "base: 1 tensors have non-finite values"),
    "foreign": (lambda _, e: e["h.0.weight"].add_(100), "['bad'] are farther from the base"),
    "integer shape": (lambda _, e: e.update(ids=torch.arange(4)), "ids [4] vs base [3]"),
}


@pytest.mark.parametrize(("change", "text"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_and_is_one_that_a_merge_refuses(
    change: Callable[[State, State], object], text: str
) -> None:
    base, bad = fault(change)
    report = inspect(base, {"good": expert(2), "bad": bad})
    assert len(report.problems) == 1
    assert text in report.problems[0]
    assert report.vectors is not None
    with pytest.raises(InputError):
        TaskVectors.open(base, {"good": expert(2), "bad": bad})


def test_all_faults_of_all_experts_stand_in_one_report() -> None:
    changes = {name: change for name, (change, _) in FAULTS.items() if "base" not in name}
    report = inspect(make_base(), {name: fault(change)[1] for name, change in changes.items()})
    assert len(report.problems) == len(changes)
    for name in changes:
        assert any(repr(name) in problem for problem in report.problems)


def test_every_tensor_that_differs_has_a_verdict() -> None:
    base, bad = make_base(), expert(1)
    del bad["scale"]
    bad |= {
        "twin.weight": bad["h.0.weight"].clone(),
        "extra": torch.ones(2),
        "h.0.bias": torch.ones(7).half(),
    }
    bad["h.2.weight"] = bad["h.2.weight"].to(torch.float8_e4m3fn)
    rows = {row.tensor: (row.verdict, row.base, row.found) for row in inspect(base, {"bad": bad}).misfits}
    assert rows == {
        "scale": ("missing", "float32 []", None),
        "twin.weight": ("alias", None, "float32 [6, 4]"),
        "extra": ("unexpected", None, "float32 [2]"),
        "h.0.bias": ("shape", "float32 [6]", "float16 [7]"),
        "h.2.weight": ("quantised", "float32 [4, 4]", "float8_e4m3fn [4, 4]"),
    }
    excluded = inspect(base, {"bad": bad}, exclude=["extra", "h.2*", "*bias"], allow_missing=["sc*"])
    assert not excluded.problems
    assert {row.verdict for row in excluded.misfits} == {"alias"}
    kept = [row.tensor for row in excluded.kept if row.reason == "excluded"]
    assert sorted(kept) == ["h.0.bias", "h.2.weight"]


def test_values_that_are_not_finite_are_counted_and_located_and_the_rest_is_measured() -> None:
    base, bad, good = make_base(), expert(1), expert(2)
    bad["h.0.weight"][1, 2:] = torch.tensor([NAN, math.inf])
    report = inspect(base, {"bad": bad, "good": good})
    (row,) = report.nonfinite
    assert (row.role, row.tensor, row.count, row.first) == ("bad", "h.0.weight", 2, (1, 2))
    alone, found = inspect(base, {"good": good}).vectors, report.vectors
    assert alone is not None
    assert found is not None
    assert found.norm["good"] == alone.norm["good"]
    assert found.relative_norm["good"] == alone.relative_norm["good"]


def test_an_expert_that_is_nan_throughout_is_neither_equal_to_the_base_nor_judged() -> None:
    bad = {n: t * NAN if t.is_floating_point() else t for n, t in make_base().items()}
    report = inspect(make_base(), {"bad": bad})
    assert len(report.problems) == 1
    assert "7 tensors have non-finite values" in report.problems[0]
    assert report.zero == ()
    assert report.same_base == {}
    assert report.vectors is None


def test_what_no_merge_changes_may_be_infinite() -> None:
    base, tower = {"mask": torch.tensor([0.0, -math.inf]), "w": torch.ones(3)}, {"w": torch.ones(3) * 1.1}
    report = inspect(base, {"cars": tower}, allow_missing=["mask"])
    assert not report.problems
    assert report.notes == (
        "base: 1 tensors have non-finite values; first index (count): mask[1] (1). No merge changes them.",
    )


def test_unchanged_and_repeated_experts_are_noted_where_a_merge_warns() -> None:
    experts = {"cars": expert(1), "copy": expert(1), "same": make_base(), "again": make_base()}
    report = inspect(make_base(), experts)
    assert not report.problems
    assert report.zero == ("same", "again")
    assert report.repeated == (("cars", "copy"),)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AdamergeWarning)
        TaskVectors.open(make_base(), experts)
    assert sorted(report.notes) == sorted(str(warning.message) for warning in caught)


def test_experts_that_all_equal_the_base_are_refused() -> None:
    report = inspect(make_base(), {"a": make_base(), "b": make_base()})
    assert report.problems == ("no expert differs from the base. Are these the fine-tuned files?",)
    found = report.vectors
    assert found is not None
    assert found.cosine == [[None, None]] * 2
    assert found.conflict.share is None
    assert found.ranks is not None
    assert found.ranks.effective == {"a": None, "b": None}


def test_reports_of_any_shapes_are_finite_documents() -> None:
    base = {"empty": torch.zeros(0, 3), "zero": torch.zeros(4, 4), "one": torch.zeros(1, 1)}
    report = inspect(base, {"a": {**base, "one": torch.ones(1, 1)}})
    document = json.loads(report.document())
    assert document["vectors"]["entries"] == 17
    assert document["vectors"]["relative_norm"] == {"a": None}  # the base is zero
    assert document["vectors"]["cosine"] == [[1.0]]


def test_statistics_of_batch_norms_are_noted() -> None:
    base = {"bn.running_mean": torch.zeros(3), "w": torch.ones(3)}
    report = inspect(base, {"a": {n: t + 0.1 for n, t in base.items()}})
    assert report.notes == ("statistics of batch norms are merged like weights: bn.running_mean.",)


def write_adapter(folder: Path) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    factors = {"A": torch.ones(2, 4), "B": torch.arange(12.0).reshape(6, 2)}
    tensors = {f"base_model.model.h.0.lora_{part}.weight": t for part, t in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_are_experts_whose_rank_is_known(tmp_path: Path) -> None:
    save_file(make_base(), tmp_path / "base.safetensors")
    report = inspect(
        tmp_path / "base.safetensors", {"lora": write_adapter(tmp_path / "lora")}, allow_missing=["*"]
    )
    assert report.experts["lora"].lora_ranks == {"2": 1}
    assert report.vectors is not None
    assert report.vectors.unchanged == {"lora": 5}
    assert {row.tensor: row.ranks.effective["lora"] for row in report.vectors.matrices}["h.0.weight"] == (
        pytest.approx(1)  # both rows of A are equal
    )


def test_an_expert_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    save_file(expert(1), tmp_path / "good.safetensors")
    experts = {"cut": tmp_path / "cut.safetensors", "good": tmp_path / "good.safetensors"}
    report = inspect(make_base(), experts)
    assert report.tasks == ("good",)
    assert len(report.problems) == 1
    assert "expert 'cut'" in report.problems[0]
    with pytest.raises(InputError, match="cut.safetensors(.|\n)*Nothing is left to inspect"):
        inspect(make_base(), {"cut": tmp_path / "cut.safetensors"})


def test_configurations_that_differ_are_a_problem(tmp_path: Path) -> None:
    for name, size in (("base", 224), ("cars", 336)):
        (tmp_path / name).mkdir()
        save_file(make_base() if name == "base" else expert(1), tmp_path / name / "model.safetensors")
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps({"crop_size": size}))
    (problem,) = inspect(tmp_path / "base", {"cars": tmp_path / "cars"}).problems
    assert "crop_size differs" in problem


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_problems_are_what_a_merge_refuses(rows: list[list[int]]) -> None:
    base = {"a": torch.tensor([1.0, 2.0, -1.0]), "b": torch.ones(3)}
    experts = {}
    for i, row in enumerate(rows):
        moved = torch.tensor(row, dtype=torch.float32)
        experts[f"e{i}"] = {"a": base["a"] + moved[:3], "b": base["b"] + moved[3:]}
    refused = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdamergeWarning)
        try:
            TaskVectors.open(base, experts)
        except InputError as error:
            refused.append(" ".join(str(error).splitlines()))
    assert list(inspect(base, experts).problems) == refused
