"""TaskVectors: opening, describing and merging; and every wrong expert that can be met."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TASKS
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from adamerge import merge, staged_step
from adamerge.checkpoints import open_checkpoint
from adamerge.errors import AdamergeWarning, InputError
from adamerge.vectors import DenseCodec, TaskVectors

State = dict[str, Tensor]


def base() -> State:
    generator = torch.Generator().manual_seed(0)
    state = {"conv.weight": torch.randn(4, 3, 2, 2, generator=generator), "conv.bias": torch.zeros(4)}
    return state | {"ln.weight": torch.ones(4), "steps": torch.tensor(7)}


def expert(seed: int = 1, size: float = 0.02) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=generator) if name != "steps" else tensor
        for name, tensor in base().items()
    }


@pytest.fixture
def vectors() -> TaskVectors:
    return TaskVectors.open(base(), {"cars": expert(1), "digits": expert(2)})


def test_names_are_sorted_and_integers_rest(vectors: TaskVectors) -> None:
    assert vectors.names == ("conv.bias", "conv.weight", "ln.weight")
    assert set(vectors.rest) == {"steps"}
    assert vectors.tasks == ("cars", "digits")


def test_a_one_hot_row_is_the_expert_and_zero_is_the_base(vectors: TaskVectors) -> None:
    for task, state in (("cars", expert(1)), ("digits", expert(2))):
        merged = vectors.state(vectors.one_hot(task))
        for name, tensor in state.items():
            assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)
    merged = vectors.state(vectors.uniform(0.0))
    assert all(torch.equal(merged[name], tensor) for name, tensor in base().items())
    assert all(torch.equal(vectors.base_state()[name], tensor) for name, tensor in base().items())


def test_merging_some_tensors_gives_the_same_values(vectors: TaskVectors) -> None:
    coefficients = torch.linspace(0, 1, 6).reshape(2, 3)
    everything = vectors.merge(coefficients)
    some = vectors.merge(coefficients, ["ln.weight", "conv.bias", "unknown"])
    assert list(some) == ["conv.bias", "ln.weight"]
    assert all(torch.equal(some[name], everything[name]) for name in some)


def test_one_value_per_task_is_expanded(vectors: TaskVectors) -> None:
    assert vectors.uniform([0.1, 0.9]).tolist() == [pytest.approx([0.1] * 3), pytest.approx([0.9] * 3)]


def test_its_size_is_base_plus_vectors(vectors: TaskVectors) -> None:
    n_entries = 4 * 3 * 4 + 4 + 4
    assert vectors.n_bytes == (1 + 2) * 4 * n_entries
    half = TaskVectors.open(base(), {"cars": expert()}, DenseCodec(torch.bfloat16))
    assert half.n_bytes == (4 + 2) * n_entries
    assert half.codec.name == "bf16"


def test_an_edit_gives_vectors_in_the_same_codec() -> None:
    half = TaskVectors.open(base(), {"cars": expert()}, "fp16")
    doubled = half.edit(lambda _, stack: 2 * stack)
    assert_close(doubled.merge(doubled.uniform(0.5)), half.merge(half.uniform(1.0)))
    assert doubled.n_bytes == half.n_bytes
    assert len(half.stacks()) == 3


def test_it_moves_whole(vectors: TaskVectors) -> None:
    moved = vectors.to("cpu")
    assert_close(moved.merge(moved.uniform(0.3)), vectors.merge(vectors.uniform(0.3)))


def test_files_and_states_give_the_same_vectors_each_with_its_digest(clip: Path) -> None:
    paths = {task: clip / "experts" / f"{task}.safetensors" for task in TASKS}
    from_files = TaskVectors.open(clip / "base", paths, allow_missing=["*"])
    states = {task: dict(open_checkpoint(path)) for task, path in paths.items()}
    from_states = TaskVectors.open(dict(open_checkpoint(clip / "base")), states, allow_missing=["*"])
    for (name, a), (other, b) in zip(from_files.stacks(), from_states.stacks(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    for digests in (from_files.digests, from_states.digests):
        assert list(digests) == ["base", *TASKS]
        assert len(set(digests.values())) == 4


def test_only_tensors_that_some_expert_has_take_part() -> None:
    partial = {"conv.bias": torch.ones(4)}
    vectors = TaskVectors.open(base(), {"cars": partial, "digits": expert()}, allow_missing=["*"])
    assert torch.equal(vectors.blocks["ln.weight"].dense()[0], torch.zeros(4))
    alone = TaskVectors.open(base(), {"cars": partial}, allow_missing=["*"])
    assert alone.names == ("conv.bias",)
    assert set(alone.base_state()) == set(base())


def test_subtraction_is_in_fp32_whatever_the_files_hold() -> None:
    wide = torch.tensor([1.0, 256.0])
    vectors = TaskVectors.open({"w": wide.bfloat16()}, {"cars": {"w": wide + 1e-3}})
    assert_close(vectors.blocks["w"].dense()[0], torch.full((2,), 1e-3), rtol=0.05, atol=1e-6)


Change = Callable[[State], object]
WRONG: dict[str, tuple[Change, list[str]]] = {
    "another width": (
        lambda s: s.update({"conv.weight": torch.zeros(4, 3, 1, 1)}),
        ["expert 'cars': 1 of 4 tensors differ", "conv.weight [4, 3, 1, 1] vs base [4, 3, 2, 2]"],
    ),
    "a missing tensor": (lambda s: s.pop("ln.weight"), ["lacks 1 of 4", "ln.weight", "allow_missing"]),
    "an extra tensor": (lambda s: s.update(new=torch.ones(1)), ["has 1 tensors that the base lacks: new"]),
    "a prefix": (
        lambda s: [s.update({"module." + n: s.pop(n)}) for n in list(s)],
        ["lacks 4 of 4 tensors", "carry the prefix 'module.': strip it"],
    ),
    "NaN": (lambda s: s["conv.weight"][1, 2, 0].fill_(math.nan), ["'cars': 2 non-finite", "[1, 2, 0, 0]"]),
    "infinity": (lambda s: s["conv.bias"][3:].fill_(math.inf), ["1 non-finite", "conv.bias", "[3]"]),
    "another base": (
        lambda s: [t.mul_(5) for t in s.values()],
        ["experts ['cars'] are farther", "'cars' 4", "'digits' 0.0", "force=True"],
    ),
    "quantised": (
        lambda s: s.update({"ln.weight": s["ln.weight"].to(torch.float8_e4m3fn)}),
        ["expert 'cars': quantised tensors ln.weight: dequantise first"],
    ),
    "a meta tensor": (lambda s: s.update({"ln.weight": torch.ones(4, device="meta")}), ["meta device"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_expert_is_refused_by_name(what: str) -> None:
    change, fragments = WRONG[what]
    cars = {name: tensor.clone() for name, tensor in expert(1).items()}
    change(cars)
    with pytest.raises(InputError) as caught:
        TaskVectors.open(base(), {"cars": cars, "digits": expert(2)})
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_problems_are_told_at_once() -> None:
    cars, digits = expert(1), expert(2)
    del cars["conv.bias"]
    digits["ln.weight"] = torch.ones(9)
    with pytest.raises(InputError, match=r"(?s)'cars' lacks.*conv\.bias.*'digits': 1 of 4.*ln\.weight"):
        TaskVectors.open(base(), {"cars": cars, "digits": digits})


def test_a_foreign_expert_can_be_forced() -> None:
    foreign = {n: 5 * t for n, t in expert().items() if n != "steps"} | {"steps": torch.tensor(1)}
    assert TaskVectors.open(base(), {"cars": foreign}, force=True).tasks == ("cars",)


def test_a_base_of_zeros_has_no_norm_to_compare_with() -> None:
    vectors = TaskVectors.open({"w": torch.zeros(3)}, {"cars": {"w": torch.ones(3)}})
    assert torch.equal(vectors.blocks["w"].dense()[0], torch.ones(3))


def test_experts_equal_to_the_base_are_refused_all_and_warned_of_singly() -> None:
    with pytest.raises(InputError, match="no expert differs from the base"):
        TaskVectors.open(base(), {"cars": base(), "digits": base()})
    with pytest.warns(AdamergeWarning, match="expert 'cars' equals the base"):
        TaskVectors.open(base(), {"cars": base(), "digits": expert()})


def test_the_same_file_twice_is_warned_of(clip: Path) -> None:
    file = clip / "experts" / "dots.safetensors"
    with pytest.warns(AdamergeWarning, match="experts 'a' and 'b' are equal"):
        TaskVectors.open(clip / "base", {"a": file, "b": file}, allow_missing=["*"])


def test_opposite_experts_are_not_taken_for_equal() -> None:
    step = torch.tensor([1.0, 2.0])
    vectors = TaskVectors.open({"w": 10 * step}, {"to": {"w": 11 * step}, "fro": {"w": 9 * step}})
    assert torch.equal(vectors.merge(vectors.uniform(1.0))["w"], 10 * step)


def test_a_quantised_base_is_refused() -> None:
    quantised = base() | {"ln.weight": torch.ones(4).to(torch.float8_e5m2)}
    with pytest.raises(InputError, match=r"base: quantised tensors ln\.weight: dequantise first"):
        TaskVectors.open(quantised, {"cars": expert()})


def test_no_experts_and_unknown_codecs_are_refused() -> None:
    with pytest.raises(InputError, match="no experts were given"):
        TaskVectors.open(base(), {})
    with pytest.raises(InputError, match=r"codec 'bf15' is unknown\.\nDid you mean 'bf16'"):
        TaskVectors.open(base(), {"cars": expert()}, "bf15")


def test_a_codec_that_overflows_names_the_tensor_and_another_codec() -> None:
    far = expert() | {"conv.bias": torch.full((4,), 7e4)}
    with pytest.raises(InputError, match=r"'fp16' cannot hold conv\.bias: .* 7e\+04\.\nUse codec='bf16'"):
        TaskVectors.open(base(), {"cars": far}, "fp16", force=True)


def test_files_behind_symlinks_and_unusual_names_open(tmp_path: Path) -> None:
    folder = tmp_path / "Modèle β [1] 模型"
    folder.mkdir()
    save_file(base(), folder / "base.safetensors")
    save_file(expert(), folder / "stored")
    (folder / "cars.safetensors").symlink_to(folder / "stored")
    vectors = TaskVectors.open(folder / "base.safetensors", {"cars": str(folder / "cars.safetensors")})
    assert vectors.names == ("conv.bias", "conv.weight", "ln.weight")


class TestTiedTensors:
    """A tensor under two names is one parameter: merged once, trained once, given back twice."""

    @pytest.fixture
    def tied(self) -> TaskVectors:
        embedding = torch.arange(6.0).reshape(3, 2)
        base = {"embed": embedding, "head": embedding.clone(), "norm": torch.ones(2)}
        experts = {t: {n: x + k for n, x in base.items()} for k, t in enumerate(("a", "b"), 1)}
        return TaskVectors.open(base, experts)

    def test_they_count_once(self, tied: TaskVectors) -> None:
        assert tied.names == ("embed", "norm")
        assert tied.aliases == {"head": "embed"}

    def test_every_state_has_both_names(self, tied: TaskVectors) -> None:
        for state in (tied.state(tied.uniform(0.5)), tied.base_state(), merge(tied, "average")):
            assert sorted(state) == ["embed", "head", "norm"]
            assert torch.equal(state["head"], state["embed"])

    def test_both_names_give_to_one_gradient(self, tied: TaskVectors) -> None:
        coefficients = tied.uniform(0.3).clone()
        step = staged_step(tied, coefficients, [lambda w: 2 * w["embed"].sum() + 3 * w["head"].sum()])
        assert_close(step.gradient, torch.tensor([[5.0 * 6, 0.0], [5.0 * 12, 0.0]]))
