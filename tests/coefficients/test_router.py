"""What single routers promise beyond their contract: networks, groups, starts, and options."""

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.testing import assert_close

from adamerge.coefficients import Coefficients, Oracle, Router, Routing, Subspace, Uniform
from adamerge.errors import InputError

TASKS = ("cars", "digits", "textures")
MLP = "visual.transformer.resblocks.0.mlp.c_fc.weight"
BLOCKS = {f"visual.transformer.resblocks.{i}": 6 for i in range(2)}


def features(count: int = 9, dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def built(router: Routing | None = None, sizes: dict[str, int] | None = None, **options: object) -> Routing:
    router = router or Router(**options)
    router.build(TASKS, sizes or (BLOCKS if router.reads == "block" else {"": 6}))
    return router


class TestGroups:
    def test_one_gate_for_all_tensors_unless_blocks_are_read(self) -> None:
        for router in (Router(), Oracle(), Uniform(), Subspace()):
            assert router.group_of(MLP) == router.group_of("visual.conv1.weight") == ""

    def test_tensors_of_a_block_share_its_gate_and_those_outside_have_none(self) -> None:
        router = Router(reads="block")
        assert router.group_of(MLP) == router.group_of(MLP.replace("c_fc", "c_proj"))
        assert router.group_of(MLP) == "visual.transformer.resblocks.0"
        assert router.group_of("visual.conv1.weight") is None

    @pytest.mark.parametrize("make", [Router, Oracle, Uniform, Subspace])
    def test_a_pattern_leaves_other_tensors_to_the_shared_model(self, make: type[Routing]) -> None:
        assert make(groups=r"\.mlp\.").group_of(MLP) is not None
        assert make(groups=r"\.mlp\.").group_of(MLP.replace("mlp", "attn")) is None

    def test_blocks_have_networks_of_their_own_or_share_one(self) -> None:
        x, (first, second) = features(), BLOCKS
        apart, together = built(reads="block"), built(reads="block", shared=True)
        assert not torch.equal(apart(x, first), apart(x, second))
        assert torch.equal(together(x, first), together(x, second))
        assert apart.table()[0] == [first, second]
        assert together.table()[0] == ["all"]


class TestNetworks:
    @pytest.mark.parametrize(
        ("network", "count"),
        [
            ("linear", 12 * (768 * 8 + 8)),  # 73.8 k, as published
            ("mlp", 12 * (768 * 768 + 768 + 768 * 8 + 8)),  # 7.16 M, as published
            ("bias", 12 * 8),
        ],
    )
    def test_gates_of_a_b32_have_the_published_size(self, network: str, count: int) -> None:
        router = Router(network, "block")
        router.build([f"task {i}" for i in range(8)], {f"blocks.{i}": 768 for i in range(12)})
        assert sum(p.numel() for p in router.parameters()) == count

    def test_the_published_network_is_two_hidden_layers_of_double_width(self) -> None:
        layers = built(network="paper").networks[0]
        kinds = ["Linear", "BatchNorm1d", "LeakyReLU", "_Dropout"]
        assert [type(layer).__name__ for layer in layers] == [*kinds, *kinds, "Linear"]
        assert [layers[i].weight.shape for i in (0, 4, 8)] == [(12, 6), (12, 12), (3, 12)]

    def test_gates_are_drawn_from_a_narrow_normal(self) -> None:
        router = Router("mlp")
        router.build(TASKS, {"": 400})
        assert float(router.networks[0][0].weight.detach().std()) == pytest.approx(0.01, rel=0.02)

    @pytest.mark.parametrize("network", ["linear", "paper", "bias"])
    def test_gates_start_as_task_arithmetic(self, network: str) -> None:
        router = built(network=network, select="none", initial=0.3)
        assert torch.equal(router(features()), torch.full((9, 3), 0.3))

    def test_mlp_gates_start_near_task_arithmetic(self) -> None:
        weights = built(network="mlp", select="none", initial=0.3)(features())
        assert_close(weights, torch.full((9, 3), 0.3), atol=0.01, rtol=0)
        assert weights.std() > 0

    def test_dropout_halves_and_rescales_and_differs_from_step_to_step(self) -> None:
        dropout = built(network="paper").networks[0][3]
        first, second = (dropout(torch.ones(200, 12)) for _ in range(2))
        assert set(first.unique().tolist()) == {0, 2}
        assert float(first.mean()) == pytest.approx(1, abs=0.1)
        assert not torch.equal(first, second)

    def test_a_resumed_run_drops_what_an_uninterrupted_one_would(self) -> None:
        going, resumed = built(network="paper"), built(network="paper")
        going(features())
        resumed.load_state_dict(going.state_dict())
        assert torch.equal(going(features()), resumed(features()))

    def test_the_published_network_refuses_to_be_trained_on_one_image(self) -> None:
        router = built(network="paper")
        with pytest.raises(InputError, match="cannot be trained on a single image"):
            router(features(1))
        assert router.eval()(features(1)).shape == (1, 3)

    def test_seeds_differ_and_leave_the_global_random_state_alone(self) -> None:
        state = torch.get_rng_state()
        one, other, again = (built(network="paper", seed=seed).eval()(features()) for seed in (0, 1, 0))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert torch.equal(torch.get_rng_state(), state)

    def test_autocast_does_not_round_the_logits(self) -> None:
        router = built(network="mlp")
        with torch.autocast("cpu", torch.bfloat16):
            inside = router.logits(features())
        assert torch.equal(inside, router.logits(features()))


class TestUntrained:
    def test_the_oracle_gives_each_sample_the_expert_of_its_task(self) -> None:
        weights = built(Oracle())(torch.tensor([2, 0, 2]))
        assert weights.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]

    def test_uniform_shares_are_equal(self) -> None:
        assert_close(built(Uniform())(features()), torch.full((9, 3), 1 / 3))

    def test_a_token_gets_the_expert_of_its_longest_projection(self) -> None:
        scores = torch.tensor([[[0.1, 2.0, 1.0], [3.0, 0.2, 0.2]]])
        assert built(Subspace())(scores).tolist() == [[[0, 1, 0], [1, 0, 0]]]

    def test_two_experts_share_a_token_by_the_softmax_of_their_scores(self) -> None:
        weights = built(Subspace(top_k=2))(torch.tensor([[0.1, 2.0, 1.0]]))
        expected = torch.tensor([0.0, 2.0, 1.0]).exp() * torch.tensor([0, 1, 1])
        assert_close(weights[0], expected / expected.sum())

    def test_they_have_no_parameters_and_nothing_to_report(self) -> None:
        for routing in (Oracle(), Uniform(), Subspace()):
            assert list(built(routing).parameters()) == []
            assert routing.table()[1].shape == (3, 0)


def test_yaml_gives_every_option() -> None:
    parser = ArgumentParser()
    parser.add_argument("--coefficients", type=Coefficients)
    options = {"network": "mlp", "reads": "block", "select": "top_p", "p": 0.4, "renormalize": True}
    options |= {"temperature": 2.0, "initial": 0.3, "groups": "mlp", "shared": True, "seed": 3}
    parsed = parser.parse_object({"coefficients": {"class_path": "Router", "init_args": options}})
    router = parser.instantiate_classes(parsed).coefficients
    assert isinstance(router, Router)
    assert (router.network, router.select, router.shared, router.seed) == ("mlp", "top_p", True, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "liner"}, "network='liner' is unknown.\nDid you mean 'linear'"),
        ({"reads": "token"}, "reads='token' is unknown"),
        ({"select": "top_5"}, "select='top_5' is unknown"),
        ({"shared": True}, "shared=True is of no use beside reads='input'"),
        ({"initial": float("inf")}, "initial=inf is not finite"),
        ({"groups": "mlp("}, r"groups='mlp\(' is no regular expression"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"select": "top_k", "k": 4}, "k=4 experts cannot be kept of 3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        built(**options)


@pytest.mark.parametrize("option", ["gate_rank", "top_k"])
def test_ranks_below_one_are_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"{option}=0 is out of range"):
        Subspace(**{option: 0})


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="k=5 experts cannot be kept of 3"):
        built(Subspace(top_k=5))
    with pytest.raises(InputError, match="groups='mpl' fits none"):
        Router(groups="mpl").build(TASKS, {})
    with pytest.raises(InputError, match="cannot share a router"):
        built(reads="block", shared=True, sizes={"layers.0": 6, "layers.1": 12})
    with pytest.raises(InputError, match="group '' reads features of size 6, found 5"):
        built()(features(dim=5))
    with pytest.raises(InputError, match="group 'layers.7' reads features of size None"):
        built()(features(), "layers.7")
