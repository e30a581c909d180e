"""Groupings by name, clamping, and options."""

import pytest
import torch

from adamerge.coefficients import Learned, group_of
from adamerge.errors import InputError

OPEN_CLIP = [
    "visual.class_embedding",
    "visual.conv1.weight",
    "visual.ln_post.bias",
    "visual.ln_post.weight",
    "visual.transformer.resblocks.0.attn.in_proj_bias",
    "visual.transformer.resblocks.0.attn.in_proj_weight",
    "visual.transformer.resblocks.0.attn.out_proj.weight",
    "visual.transformer.resblocks.0.ln_1.weight",
    "visual.transformer.resblocks.0.ls_1.gamma",
    "visual.transformer.resblocks.0.mlp.c_fc.weight",
    "visual.transformer.resblocks.11.mlp.c_proj.bias",
]
BLOCK = "visual.transformer.resblocks.0"


@pytest.mark.parametrize(
    ("grouping", "expected"),
    [
        ("task", ["all"]),
        ("tensor", OPEN_CLIP),
        (
            "block",
            [
                "visual.class_embedding",
                "visual.conv1",
                "visual.ln_post",
                BLOCK,
                "visual.transformer.resblocks.11",
            ],
        ),
        (
            "module",
            [
                "visual.class_embedding",
                "visual.conv1",
                "visual.ln_post",
                f"{BLOCK}.attn.in_proj",
                f"{BLOCK}.attn.out_proj",
                f"{BLOCK}.ln_1",
                f"{BLOCK}.ls_1.gamma",
                f"{BLOCK}.mlp.c_fc",
                "visual.transformer.resblocks.11.mlp.c_proj",
            ],
        ),
        (
            "type",
            [
                "visual.class_embedding",
                "visual.conv1",
                "visual.ln_post",
                f"{BLOCK}.attn",
                f"{BLOCK}.norm",
                f"{BLOCK}.other",
                f"{BLOCK}.mlp",
                "visual.transformer.resblocks.11.mlp",
            ],
        ),
    ],
)
def test_groups_of_a_clip_tower(grouping: str, expected: list[str]) -> None:
    groups, index = group_of(OPEN_CLIP, grouping)
    assert groups == expected
    assert [groups[i] for i in index] == [groups[i] for i in sorted(index)]  # groups are runs of names
    assert set(index) == set(range(len(groups)))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("vision_model.encoder.layers.3.self_attn.q_proj.weight", "vision_model.encoder.layers.3.attn"),
        ("vision_model.encoder.layers.3.mlp.fc1.bias", "vision_model.encoder.layers.3.mlp"),
        ("vision_model.encoder.layers.3.layer_norm2.bias", "vision_model.encoder.layers.3.norm"),
        ("blocks.7", "blocks.7.other"),
    ],
)
def test_types_of_other_dialects(name: str, label: str) -> None:
    assert group_of([name], "type")[0] == [label]


def built(**options: object) -> Learned:
    coefficients = Learned(**options)
    coefficients.build(("cars", "digits"), ("a.weight", "b.weight"))
    return coefficients


def test_the_published_start_is_three_tenths_everywhere() -> None:
    assert torch.equal(built()(), torch.full((2, 2), 0.3))
    assert built().values.shape == (2, 2)


def test_clamped_coefficients_have_no_gradient_outside_and_projected_ones_do() -> None:
    for clamp, slope in (("on", 0.0), ("projected", 1.0), ("off", 1.0)):
        coefficients = built(initial=[-0.1, 0.5], clamp=clamp)
        coefficients().sum().backward()
        assert coefficients.values.grad[0].tolist() == [slope, slope]
        assert coefficients.values.grad[1].tolist() == [1.0, 1.0]


def test_projection_clips_the_parameter_after_a_step() -> None:
    coefficients = built(initial=[-0.1, 1.5], clamp="projected")
    coefficients.after_step()
    assert coefficients.values.tolist() == [[0, 0], [1, 1]]
    free = built(initial=[-0.1, 1.5])
    free.after_step()
    assert free.values.tolist() == [pytest.approx([-0.1, -0.1]), [1.5, 1.5]]


def test_equal_layer_wise_coefficients_are_the_task_wise_ones() -> None:
    options = {"initial": [0.2, 0.6]}
    assert torch.equal(built(**options)(), built(grouping="task", **options)())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grouping": "layer"}, "grouping 'layer' is unknown"),
        ({"clamp": "yes"}, "clamp='yes' is unknown.\nUse 'off', 'on' or 'projected'"),
        ({"initial": float("nan")}, "initial=nan is not finite"),
        ({"initial": []}, "initial=\\[\\] is not finite"),
        ({"initial": [0.1]}, "initial has 1 values for 2 tasks.\nGive one .* in the order cars, digits"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        built(**options)
