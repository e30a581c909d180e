"""What the audit says of experts that do not fit their base, and which tensors are one and the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.state import State, audit, tied_names


def base() -> dict[str, Tensor]:
    return {"visual.b": torch.zeros(2), "visual.a": torch.zeros(3), "ids": torch.arange(4)}


def test_only_floating_tensors_of_some_expert_merge_in_sorted_order() -> None:
    assert audit(base(), {"cars": base()}) == ("visual.a", "visual.b")
    partial = {"visual.b": torch.ones(2)}
    assert audit(base(), {"cars": partial}, allow_missing=["visual.a", "ids"]) == ("visual.b",)


@pytest.mark.parametrize(
    ("rename", "hint"),
    [
        (lambda name: "module." + name, "carry the prefix 'module.': strip it"),
        (lambda name: name.removeprefix("visual."), "lack the prefix 'visual.': add it"),
        (
            lambda name: name.replace("visual", "other"),
            "If that is meant, pass allow_missing=[PATTERN, ...] "
            "(adamerge merge, inspect and compress: --allow_missing PATTERN).",
        ),
    ],
)
def test_names_that_differ_by_a_prefix_are_explained(rename: object, hint: str) -> None:
    expert = {rename(name): tensor for name, tensor in base().items()}
    with pytest.raises(InputError) as caught:
        audit(base(), {"cars": expert})
    assert hint in str(caught.value)


def test_long_lists_are_cut_and_counted() -> None:
    many = {f"layer.{i}": torch.zeros(1) for i in range(12)}
    with pytest.raises(InputError, match=r"lacks 12 of 12 tensors: layer\.0, .*layer\.4 and 7 more"):
        audit(many, {"cars": {}})


def test_an_image_tower_alone_is_a_complete_expert_of_a_clip() -> None:
    base = {"visual.a": torch.zeros(2), "visual.b": torch.zeros(2), "text.c": torch.zeros(2)}
    tower = {"visual.a": torch.ones(2), "visual.b": torch.ones(2)}
    assert audit(base, {"cars": tower}) == ("visual.a", "visual.b")
    with pytest.raises(InputError, match="expert 'cars' lacks 1 of 3 tensors: visual.b"):
        audit(base, {"cars": {"visual.a": torch.ones(2)}})


def refused(base: State, expert: State, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        audit(base, {"cars": expert}, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def vit(width: int, patch: int, layers: int = 2) -> dict[str, Tensor]:
    """The names and shapes of an open_clip image tower, in part."""
    state = {"visual.conv1.weight": torch.zeros(width, 3, patch, patch), "visual.proj": torch.zeros(width, 8)}
    return state | {f"visual.transformer.resblocks.{i}.ln_1.bias": torch.zeros(width) for i in range(layers)}


def test_another_vision_transformer_is_recognised() -> None:
    message = refused(vit(768, 32), vit(768, 16))
    assert "expert 'cars': 1 of 4 tensors differ from the base in shape: visual.conv1.weight" in message
    assert "[768, 3, 16, 16] vs base [768, 3, 32, 32]. Looks like ViT-B/16 vs ViT-B/32." in message
    message = refused(vit(768, 32), vit(1024, 14, layers=4))
    assert "has 2 tensors that the base lacks" in message
    assert message.count("Looks like ViT-L/14, 4 layers vs ViT-B/32, 2 layers.") == 2
    assert "allow_missing" not in message


def test_another_depth_is_recognised() -> None:
    deep, flat = ({f"model.layers.{i}.w": torch.zeros(2) for i in range(n)} for n in (12, 3))
    assert "lacks 9 of 12 tensors: model.layers.3.w" in refused(deep, flat)
    assert "Looks like 3 layers vs 12 layers." in refused(deep, flat)


def test_another_shape_of_no_known_model_may_be_excluded() -> None:
    message = refused({"w": torch.zeros(2), "v": torch.zeros(2)}, {"w": torch.zeros(3), "v": torch.zeros(2)})
    assert (
        "Another architecture? To keep the base's values, pass exclude=[PATTERN, ...] "
        "(adamerge merge, inspect and compress: --exclude PATTERN)." in message
    )


def language_model(tokens: int) -> dict[str, Tensor]:
    values = torch.arange(4.0 * tokens).reshape(tokens, 4)
    return {
        "lm_head.bias": torch.zeros(tokens),
        "lm_head.weight": values,
        "model.embed_tokens.weight": values.clone(),
        "model.norm.weight": torch.ones(4),
    }


def test_other_vocabularies_are_told_and_can_be_excluded() -> None:
    names = ["lm_head.bias", "lm_head.weight", "model.embed_tokens.weight"]
    message = refused(language_model(9), language_model(7))
    assert (
        f"Vocabularies of 7 vs 9 tokens. To keep the base's, pass exclude={names} "
        "(adamerge merge, inspect and compress: --exclude lm_head.bias --exclude lm_head.weight" in message
    )
    for exclude in (names, ["lm_head*", "*embed*"]):
        assert audit(language_model(9), {"cars": language_model(7)}, exclude=exclude) == (
            "model.norm.weight",
        )


@pytest.mark.parametrize(
    "change",
    [
        {"visual.a": torch.zeros(9)},
        {"visual.a": torch.zeros(3, dtype=torch.float8_e5m2)},
        {"visual.a": torch.zeros(3, device="meta")},
        {"visual.abc": torch.zeros(3)},
    ],
    ids=["shape", "quantised", "meta", "extra"],
)
def test_what_is_excluded_stays_the_bases_whatever_an_expert_holds(change: dict[str, Tensor]) -> None:
    expert = base() | change
    refused(base(), expert)
    assert audit(base(), {"cars": expert}, exclude=["visual.a*"]) == ("visual.b",)
    del expert["visual.a"]
    assert audit(base(), {"cars": expert}, exclude=["visual.a*"]) == ("visual.b",)


def test_an_extra_tensor_may_be_excluded() -> None:
    assert "has 1 tensors that the base lacks: new. If they may be left out, pass exclude=" in refused(
        base(), base() | {"new": torch.ones(2)}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"visual.a": torch.zeros(3).to(torch.float8_e4m3fn)},
            "quantised tensors visual.a: dequantise first (found torch.float8_e4m3fn)",
        ),
        ({"visual.a": torch.zeros(3).char()}, "visual.a: dequantise first (found torch.int8)"),
        ({"visual.a.qweight": torch.zeros(3).int()}, "the base lacks: visual.a.qweight. It looks quantised"),
        ({"visual.a": torch.zeros(3, device="meta")}, "'cars': tensor visual.a is on the meta device"),
    ],
)
def test_tensors_without_ordinary_values_are_refused(change: dict[str, Tensor], message: str) -> None:
    assert message in refused(base(), base() | change)


class Opened(dict):
    """A state that knows where it comes from."""

    root = Path("models/cars")


def test_messages_name_the_experts_path() -> None:
    assert "expert 'cars' (models/cars) lacks 3 of 3 tensors" in refused(base(), Opened())


@pytest.mark.parametrize(
    ("names", "message"), [(["a/b"], "'a/b' cannot be"), (["a", "A"], "differ only in case")]
)
def test_tasks_that_cannot_name_files_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        audit(base(), dict.fromkeys(names, base()))


def test_a_stored_alias_is_no_extra_tensor() -> None:
    """As some programs write the head of a model whose embeddings are tied."""
    base = language_model(5)
    del base["lm_head.weight"]
    expert = language_model(5)
    assert audit(base, {"cars": expert}) == tuple(sorted(base))
    expert["lm_head.weight"] = expert["lm_head.weight"] + 1
    assert "has 1 tensors that the base lacks: lm_head.weight" in refused(base, expert)
    assert "lacks: zeros" in refused(
        base, language_model(5) | {"zeros": torch.ones(4)}
    )  # a constant is no copy


def test_matrices_equal_everywhere_are_tied() -> None:
    base, cars = language_model(5), {n: t + 1 for n, t in language_model(5).items()}
    tied = {"model.embed_tokens.weight": "lm_head.weight"}
    assert tied_names(base, {"cars": cars, "dots": base}) == tied
    assert tied_names(base, {}) == tied
    assert tied_names(base, {"a tower": {}}) == tied
    cars["lm_head.weight"][4, 3] += 1
    assert tied_names(base, {"cars": cars, "dots": base}) == {}


def test_an_expert_without_the_alias_keeps_the_tie() -> None:
    base, cars = language_model(5), language_model(5)
    del cars["lm_head.weight"]
    assert tied_names(base, {"cars": cars, "dots": base}) == {"lm_head.weight": "model.embed_tokens.weight"}


def test_all_aliases_stand_for_one_name() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert tied_names(dict.fromkeys("cab", matrix), {}) == {"b": "a", "c": "a"}


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(64, 64),
        torch.ones(1, 1),
        torch.zeros(0, 3),
        torch.arange(9.0),
        torch.arange(6).reshape(2, 3),
    ],
    ids=["constant", "one value", "empty", "vector", "integers"],
)
def test_what_may_be_equal_by_chance_is_not_tied(matrix: Tensor) -> None:
    assert tied_names({"a": matrix, "b": matrix.clone()}, {}) == {}


def test_a_constant_sample_is_no_proof() -> None:
    sparse = torch.zeros(64, 64)
    sparse[7, 7] = 1
    assert tied_names({"a": sparse, "b": sparse.clone()}, {}) == {"b": "a"}
    assert tied_names({"a": sparse, "b": torch.zeros(64, 64)}, {}) == {}
    assert tied_names({"a": torch.zeros(2, 2), "b": -torch.zeros(2, 2)}, {}) == {}


ONE, MATRIX = torch.ones(1), torch.ones(2, 2)
CODES = {
    "GPTQ and AWQ": {"l.qweight": MATRIX.int(), "l.qzeros": ONE.int(), "l.scales": torch.ones(2)},
    "bitsandbytes int8": {"l.weight": MATRIX.char(), "l.SCB": torch.ones(2)},
    "bitsandbytes 4-bit": {"l.weight": torch.ones(4, 1).byte(), "l.weight.absmax": ONE},
    "fp8 with scales": {"l.weight": MATRIX.to(torch.float8_e4m3fn), "l.weight_scale_inv": ONE},
    "compressed-tensors": {"l.weight_packed": torch.ones(2, 1).int(), "l.weight_scale": ONE},
    "HQQ": {"l.W_q": MATRIX.byte(), "l.scale": ONE},
    "MXFP4": {"l.weight_blocks": MATRIX.byte(), "l.weight_scales": ONE.byte()},
    "zero points": {"l.weight": MATRIX.byte(), "l.weight_zp": ONE.char()},
    "integer codes of an unknown method": {"l.weight": MATRIX.short()},
}


class TestQuantised:
    @pytest.mark.parametrize("kind", CODES)
    @pytest.mark.parametrize("side", ["both", "expert", "base"])
    def test_codes_are_refused_on_either_side(self, kind: str, side: str) -> None:
        full = {"n.weight": torch.ones(2), "l.weight": torch.ones(2, 2)}
        coded = {"n.weight": torch.ones(2), **CODES[kind]}
        expert = {n: t + 1 if t.dtype in (torch.float32, torch.int32) else t for n, t in coded.items()}
        told = refused(full if side == "expert" else coded, full if side == "base" else expert)
        assert "quantised" in told

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.uint8])
    def test_what_no_merge_changes_may_not_differ(self, dtype: torch.dtype) -> None:
        ours = {"w": torch.ones(2), "codes": torch.ones(4).to(dtype), "count": torch.tensor(1)}
        theirs = {"w": torch.zeros(2), "codes": torch.ones(4).to(dtype), "count": torch.tensor(9)}
        assert audit(ours, {"x": theirs}) == ("w",)
        theirs["codes"] = 2 * theirs["codes"]
        told = refused(ours, theirs)
        assert f"1 tensors of {dtype} differ from the base" in told
        assert "--exclude codes" in told
        assert audit(ours, {"x": theirs}, exclude=["codes"]) == ("w",)

    def test_integers_that_one_side_lacks_do_no_harm(self) -> None:
        plain, ids = {"w": torch.ones(2)}, {"table": torch.arange(4), "tower.num_blocks": torch.tensor(3)}
        assert audit(plain | ids, {"x": plain}) == audit(plain, {"x": plain | ids}) == ("w",)


def test_lora_matrices_beside_weights_are_named() -> None:
    """As a state dict of a PEFT model holds them; leaving them out would leave the training out."""
    base = {"l.weight": torch.ones(2, 2)}
    lora = {"l.lora_A.default.weight": torch.ones(1, 2), "l.lora_B.default.weight": torch.ones(2, 1)}
    assert "merge them with PEFT" in refused(base, base | lora)
    assert "Of an adapter, give the folder." in refused(base, lora)


def test_where_no_name_is_shared_nothing_is_advised_that_leaves_nothing() -> None:
    told = refused({"a.weight": torch.ones(2, 2)}, {"b/kernel": torch.ones(2, 2)})
    assert "It shares no name with the base" in told
    assert "allow_missing" not in told
