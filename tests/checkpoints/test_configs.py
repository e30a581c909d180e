"""Models of equal shapes are told apart by their configurations; what does not matter may differ."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from adamerge.errors import AdamergeWarning, InputError
from adamerge.models.opening import require_same_function, require_same_transformers

CLIP: dict[str, Any] = {
    "model_type": "clip",
    "projection_dim": 8,
    "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 24},
    "text_config": {"model_type": "clip_text_model", "hidden_act": "quick_gelu"},
}
IMAGES: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_resize": True,
}


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", config=CLIP, preprocessor_config=IMAGES)


def changed(config: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """Give a copy with one dotted key set."""
    first, _, rest = key.partition(".")
    return config | {first: changed(config[first], rest, value) if rest else value}


def refused(base: Path, expert: Path) -> str:
    with pytest.raises(InputError) as caught:
        require_same_transformers(base, {"cars": expert})
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "vision_config.hidden_act",
            "gelu",
            "activation differs: base 'quick_gelu', expert 'cars' 'gelu' (vision_config.hidden_act).\n"
            "Experts must share the base's architecture",
        ),
        ("vision_config.patch_size", 16, "vision_config.patch_size differs: base 32, expert 'cars' 16."),
        ("projection_dim", 9, "projection_dim differs: base 8, expert 'cars' 9."),
        ("model_type", "bert", "model_type differs: base 'clip', expert 'cars' 'bert'."),
    ],
)
def test_a_setting_that_changes_the_function_is_refused(
    base: Path, tmp_path: Path, key: str, value: object, message: str
) -> None:
    """Also against a default that the base does not write, as its patch size."""
    assert message in refused(base, write(tmp_path / "cars", config=changed(CLIP, key, value)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_name_or_path", "here"),
        ("transformers_version", "4.1"),
        ("torch_dtype", "float16"),
        ("architectures", ["CLIPModel"]),
        ("id2label", {"0": "cat"}),
        ("vision_config.attention_dropout", 0.1),
        ("vision_config._attn_implementation", "sdpa"),
        ("vision_config.layer_norm_eps", 1e-5),  # the default, written out
        ("text_config.vocab_size", 99),  # the tensors tell
        ("of_a_later_version", 1),
    ],
)
def test_a_setting_that_does_not_may_differ(base: Path, tmp_path: Path, key: str, value: object) -> None:
    require_same_transformers(base, {"cars": write(tmp_path / "cars", config=changed(CLIP, key, value))})


def test_an_image_tower_is_compared_with_its_part_of_a_clip(base: Path, tmp_path: Path) -> None:
    tower = CLIP["vision_config"]
    require_same_transformers(base, {"cars": write(tmp_path / "cars", config=tower)})
    assert "activation differs" in refused(
        base, write(tmp_path / "cars", config=changed(tower, "hidden_act", "gelu"))
    )


@pytest.mark.parametrize("kind", ["unknown", "llama"])
def test_models_that_transformers_cannot_build_are_compared_as_written(tmp_path: Path, kind: str) -> None:
    config = {"model_type": kind, "hidden_size": "large", "hidden_act": "silu"}
    base = write(tmp_path / "base", config=config)
    require_same_transformers(base, {"cars": write(tmp_path / "cars", config=config | {"new": 1})})
    assert "activation differs: base 'silu', expert 'cars' 'gelu' (hidden_act)" in refused(
        base, write(tmp_path / "cars", config=config | {"hidden_act": "gelu"})
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_mean", [0, 0, 0]), ("size", {"shortest_edge": 336}), ("do_resize", False), ("crop_size", 336)],
)
@pytest.mark.parametrize("file", ["preprocessor_config", "processor_config"])
def test_other_preprocessing_is_refused(
    base: Path, tmp_path: Path, key: str, value: object, file: str
) -> None:
    images = IMAGES | {key: value}
    content = images if file == "preprocessor_config" else {"image_processor": images}
    assert f"{key} differs: base " in refused(base, write(tmp_path / "cars", **{file: content}))


def test_the_older_form_of_sizes_is_the_same(base: Path, tmp_path: Path) -> None:
    older = IMAGES | {"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    require_same_transformers(base, {"cars": write(tmp_path / "cars", preprocessor_config=older)})


def test_all_differences_of_all_experts_are_told_at_once(base: Path, tmp_path: Path) -> None:
    other = changed(CLIP, "text_config.hidden_act", "gelu") | {"projection_dim": 9}
    experts = {task: write(tmp_path / task, config=other) for task in ("cars", "digits")}
    with pytest.raises(InputError) as caught:
        require_same_transformers(base, experts)
    assert str(caught.value).count("differs") == 4


def test_what_has_no_configuration_is_not_judged(base: Path, tmp_path: Path) -> None:
    (tmp_path / "cars.safetensors").touch()
    require_same_transformers(base, {"cars": tmp_path / "cars.safetensors", "dots": write(tmp_path / "dots")})
    require_same_transformers(tmp_path / "cars.safetensors", {"dots": base})


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_named(base: Path, tmp_path: Path, text: str) -> None:
    (write(tmp_path / "cars") / "config.json").write_text(text)
    assert "config.json is no JSON object.\nDownload it again" in refused(base, tmp_path / "cars")


LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}


class TestDefaultsAndForce:
    def test_a_longest_input_is_a_warning_where_positions_are_rotated(self, tmp_path: Path) -> None:
        base = write(tmp_path / "base", config=LLAMA)
        expert = write(tmp_path / "x", config=LLAMA | {"max_position_embeddings": 32})
        with pytest.warns(AdamergeWarning, match="max_position_embeddings differs: base 64, expert 'x' 32"):
            require_same_transformers(base, {"x": expert})

    def test_a_longest_input_by_which_positions_are_scaled_is_refused(self, tmp_path: Path) -> None:
        scaled = LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
        base = write(tmp_path / "base", config=scaled)
        expert = write(tmp_path / "x", config=scaled | {"max_position_embeddings": 32})
        assert "max_position_embeddings differs" in refused(base, expert)

    @pytest.mark.parametrize(
        "change",
        [
            {"num_attention_heads": 4},
            {"rms_norm_eps": 1e-3},
            {"rope_theta": 5e5},
            {"hidden_act": "gelu"},
            {"attention_bias": True},
        ],
        ids=str,
    )
    def test_what_changes_the_function_is_refused_and_force_warns(
        self, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        base, expert = write(tmp_path / "base", config=LLAMA), write(tmp_path / "x", config=LLAMA | change)
        with pytest.raises(InputError, match="differs: base .*\n.*--force true"):
            require_same_function(base, {"x": expert})
        with pytest.warns(AdamergeWarning, match="By force, the base's setting stands"):
            require_same_function(base, {"x": expert}, force=True)

    @pytest.mark.parametrize(
        "change",
        [{"rope_theta": 10000.0}, {"temperature": 0.7}, {"use_cache": False}, {"rms_norm_eps": 1e-6}],
        ids=str,
    )
    def test_defaults_and_settings_of_generation_may_be_written_or_not(
        self, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        base, expert = write(tmp_path / "base", config=LLAMA), write(tmp_path / "x", config=LLAMA | change)
        require_same_function(base, {"x": expert})


class TestProcessors:
    """What transformers' own processors do is compared, not what their files say."""

    OLD: ClassVar[dict[str, Any]] = {"do_normalize": True, "do_resize": True, "size": 16}
    OLD |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    NEW: ClassVar[dict[str, Any]] = OLD | {"size": {"height": 16, "width": 16}, "resample": 2}

    @pytest.mark.parametrize(
        ("kind", "more"),
        [
            ("ViTImageProcessor", {}),
            ("ViTImageProcessorFast", {}),
            ("ViTFeatureExtractor", {}),
            ("ViTImageProcessor", {"do_rescale": True, "rescale_factor": 1 / 255}),
            ("ViTImageProcessor", {"do_convert_rgb": None}),
        ],
    )
    def test_one_processor_is_written_in_many_ways(
        self, tmp_path: Path, kind: str, more: dict[str, Any]
    ) -> None:
        vit = {"model_type": "vit"}
        base = write(tmp_path / "base", config=vit, preprocessor_config=self.OLD)
        new = self.NEW | {"image_processor_type": kind} | more
        require_same_transformers(base, {"x": write(tmp_path / "x", config=vit, preprocessor_config=new)})

    @pytest.mark.parametrize(
        "change", [{"size": {"height": 20, "width": 20}}, {"resample": 0}, {"image_mean": [0.4] * 3}], ids=str
    )
    def test_what_comes_out_otherwise_is_refused(self, tmp_path: Path, change: dict[str, Any]) -> None:
        vit = {"model_type": "vit"}
        base = write(tmp_path / "base", config=vit, preprocessor_config=self.OLD)
        expert = write(tmp_path / "x", config=vit, preprocessor_config=self.NEW | change)
        assert f"{next(iter(change))} differs: base " in refused(base, expert)

    @pytest.mark.parametrize("config", [{"model_type": "vit"}, {"model_type": "siglip"}, CLIP], ids=str)
    def test_processors_of_every_kind_of_model_are_compared(
        self, tmp_path: Path, config: dict[str, Any]
    ) -> None:
        config = config | {"architectures": ["ViTForImageClassification"]}
        base = write(tmp_path / "base", config=config, preprocessor_config=self.NEW)
        other = self.NEW | {"image_mean": [0.4] * 3}
        expert = write(tmp_path / "x", config=config, preprocessor_config=other)
        with pytest.raises(InputError, match="image_mean differs: base"):
            require_same_function(base, {"x": expert})
        with pytest.warns(AdamergeWarning, match="image_mean differs"):
            require_same_function(base, {"x": expert}, force=True)

    def test_images_of_enormous_sizes_are_not_made(self, tmp_path: Path) -> None:
        vit, size = {"model_type": "vit"}, {"height": 200_000, "width": 200_000}
        new = self.NEW | {"image_processor_type": "ViTImageProcessor"}
        base = write(tmp_path / "base", config=vit, preprocessor_config=new)
        expert = write(tmp_path / "x", config=vit, preprocessor_config=new | {"size": size})
        assert "size differs: base " in refused(base, expert)


class TestOpenClip:
    MODEL: ClassVar[dict[str, Any]] = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 8},
        "text_cfg": {"width": 8, "heads": 2, "layers": 1},
    }

    def write(self, folder: Path, preprocess: dict[str, Any], **model: Any) -> Path:
        document = {"model_cfg": self.MODEL | model, "preprocess_cfg": preprocess}
        return write(folder, open_clip_config=document)

    def test_absent_keys_mean_the_librarys_defaults(self, tmp_path: Path) -> None:
        base = self.write(tmp_path / "base", {})
        whole = {"size": [32, 32], "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
        vision = self.MODEL["vision_cfg"] | {"mlp_ratio": 4.0, "head_width": 64, "patch_dropout": 0.5}
        require_same_function(
            base, {"x": self.write(tmp_path / "x", whole, vision_cfg=vision, quick_gelu=False)}
        )

    @pytest.mark.parametrize(
        ("preprocess", "model", "key"),
        [
            ({"interpolation": "bilinear"}, {}, "preprocess_cfg.interpolation"),
            ({"resize_mode": "squash"}, {}, "preprocess_cfg.resize_mode"),
            ({"mean": [0.5] * 3}, {}, "preprocess_cfg.mean"),
            (
                {},
                {"vision_cfg": MODEL["vision_cfg"] | {"pool_type": "avg"}},
                "vision_cfg.pool_type",
            ),
            ({}, {"quick_gelu": True}, "activation"),
        ],
    )
    def test_other_settings_are_refused(
        self, tmp_path: Path, preprocess: dict[str, Any], model: dict[str, Any], key: str
    ) -> None:
        base, expert = self.write(tmp_path / "base", {}), self.write(tmp_path / "x", preprocess, **model)
        with pytest.raises(InputError, match=f"{key} differs: base"):
            require_same_function(base, {"x": expert})
