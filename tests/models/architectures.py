"""Tiny random models of every architecture that a library can classify with, as folders on disk."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import draw
from tiny_networks import WORDS, tokenizer
from torch import Tensor, nn
from transformers.models.auto import image_processing_auto, modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SENTENCES = ["a good b", "bad", "c red d blue a b c d"]
WIDTHS = "hidden_size d_model dim n_embd emb_dim embed_dim embedding_size projection_dim"
FORWARD_WIDTHS = """intermediate_size encoder_ffn_dim decoder_ffn_dim d_ff ffn_dim n_inner hidden_dim d_inner
    ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size mlp_dim dff"""
DEPTHS = "num_hidden_layers n_layer n_layers encoder_layers decoder_layers num_layers num_decoder_layers"
HEADS = "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
LENGTHS = "max_position_embeddings n_positions n_ctx"
SMALL = (
    dict.fromkeys(WIDTHS.split(), 32)
    | dict.fromkeys(FORWARD_WIDTHS.split(), 48)
    | dict.fromkeys(DEPTHS.split(), 2)
    | dict.fromkeys(HEADS.split(), 4)
    | dict.fromkeys(LENGTHS.split(), 64)
    | {"num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "d_head": 8, "sliding_window": 16}
    | {"image_size": 32, "patch_size": 8, "vocab_size": 64, "type_vocab_size": 2}
    | {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
)
LATENT_HEADS: dict[str, Any] = {
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16},
    **{"num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
}
MIXED_LAYERS: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
WINDOWS: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "patch_size": 4,
}
LATENTS = {
    **{"num_latents": 8, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 1},
    **{"num_self_attention_heads": 2, "num_cross_attention_heads": 2},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": LATENT_HEADS,
    "axk2": LATENT_HEADS,
    "bit": {"hidden_sizes": [16] * 4, "depths": [1] * 4, "embedding_size": 16, "num_groups": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "convnext": STAGES | {"patch_size": 4},
    "convnextv2": STAGES | {"patch_size": 4},
    "cvt": {"embed_dim": [16, 16, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 2]},
    "deepseek_v2": LATENT_HEADS,
    "deepseek_v3": LATENT_HEADS | {"first_k_dense_replace": 1},
    "deit": {"architectures": ["DeiTForImageClassification"]},
    "donut-swin": WINDOWS,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "esmc": {"num_key_value_heads": 4},
    "focalnet": {
        **{"embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32]},
        **{"focal_levels": [1, 1], "focal_windows": [3, 3], "patch_size": 4},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "hgnet_v2": {
        **{"stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 16, 16], "stage_mid_channels": [8] * 4},
        **{"stage_out_channels": [8, 16, 16, 32], "stage_num_blocks": [1] * 4, "embedding_size": 8},
        **{"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4},
    },
    "hiera": {
        **{"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "image_size": [32, 32]},
        **{"patch_size": [7, 7], "query_stride": [2, 2], "masked_unit_size": [4, 4], "num_query_pool": 1},
    },
    "imagegpt": {"n_positions": 32 * 32, "vocab_size": 513},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "levit": {
        **{"architectures": ["LevitForImageClassification"], "hidden_sizes": [16, 16, 32]},
        **{"num_attention_heads": [2, 2, 4], "depths": [1] * 3, "key_dim": [8] * 3, "image_size": 64},
        **{"patch_size": 16},
    },
    "lilt": {"hidden_size": 24, "num_attention_heads": 2},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 16},
    "minicpm3": LATENT_HEADS,
    "mistral4": LATENT_HEADS | {"first_k_dense_replace": 1, "head_dim": 16},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        **{"hidden_sizes": [16, 16, 24], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32]},
        **{"patch_size": 2, "image_size": 64, "num_attention_heads": 2},
    },
    "mobilevitv2": {"width_multiplier": 0.25, "patch_size": 2, "image_size": 64},
    "perceiver": {"architectures": ["PerceiverForImageClassificationLearned"], **LATENTS},
    "poolformer": STAGES,
    "pvt": STAGES | {"num_attention_heads": [1, 1, 2, 2], "patch_sizes": [4, 2, 2, 2]},
    "pvt_v2": STAGES | {"num_attention_heads": [1, 1, 2, 2]},
    "qwen3_5": {"text_config": MIXED_LAYERS},
    "qwen3_5_text": MIXED_LAYERS,
    "qwen3_next": MIXED_LAYERS,
    "reformer": {
        **{"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attention_head_size": 8},
        **{"attn_layers": ["local", "lsh"]},
    },
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "segformer": STAGES | {"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16, "image_size": 64},
    "swiftformer": {"embed_dims": [8, 8, 16, 16], "depths": [1] * 4, "image_size": 64},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "t5": {"decoder_start_token_id": 0},
    "textnet": {
        **{"hidden_sizes": [8, 8, 16, 16, 16], "stem_out_channels": 8},
        **{"conv_layer_kernel_sizes": [[[3, 3]]] * 4, "conv_layer_strides": [[2]] * 4},
    },
    "timm_wrapper": {
        "architecture": "test_vit",
        "pretrained_cfg": {
            **{"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3},
            **{"crop_pct": 0.95, "interpolation": "bicubic"},
        },
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}

DUAL = """aimv2 aimv2_vision_model align altclip aya_vision blip blip-2 chinese_clip chinese_clip_vision_model
    clipseg cohere2_vision flava groupvit metaclip_2 mlcd owlv2 owlvit siglip siglip_vision_model tipsv2
    tipsv2_vision_model vision-text-dual-encoder"""
PROCESSORS: dict[str, dict[str, Any]] = {
    "imagegpt": {"clusters": [[i % 8 / 4 - 1, i // 8 % 8 / 4 - 1, i // 64 / 4 - 1] for i in range(512)]},
    "siglip2": {"patch_size": 8, "max_num_patches": 16},
}


def kinds(modality: str) -> list[str]:
    """List the model types that transformers classifies images, or texts, with."""
    part = {"image": "IMAGE", "text": "SEQUENCE"}[modality]
    return sorted(getattr(modeling_auto, f"MODEL_FOR_{part}_CLASSIFICATION_MAPPING_NAMES"))


def make_dual(kind: str) -> Any:
    """Make a random dual encoder, or an image tower, in evaluation mode."""
    torch.manual_seed(0)
    return randomised(transformers.AutoModel.from_config(small_config(CONFIG_MAPPING[kind])))


def small_config(family: Any, **more: Any) -> Any:
    """Configure a model of a few thousand parameters."""
    default = family()
    settings = {
        k: v
        for k, v in SMALL.items()
        if isinstance(getattr(default, k, ""), int | float | None) and k in default.to_dict()
    }
    for name in getattr(family, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            settings[name] = small_config(type(part), **more.get(name, {})).to_dict()
    own = {key: value for key, value in more.items() if key not in getattr(family, "sub_configs", {})}
    return family(**settings | own)


def make_classifier(kind: str, modality: str, n_classes: int, seed: int) -> Any:
    """Make a random classifier of a model type of transformers, in evaluation mode."""
    torch.manual_seed(seed)
    more = dict(SPECIAL.get(kind, {}))
    if modality == "text":
        more.pop("architectures", None)
    config = small_config(CONFIG_MAPPING[kind], **more)
    config.num_labels = n_classes
    part = {"image": "Image", "text": "Sequence"}[modality]
    model = getattr(transformers, f"AutoModelFor{part}Classification").from_config(config)
    return randomised(model)


def randomised(model: nn.Module, variance: float = 0.1, strength: float = 1.0) -> Any:
    """Move all values of a model away from their initial ones, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.add_(strength * fan_in**-0.5 * torch.randn(parameter.shape))
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5 * variance, 1.5 * variance)
    return model.eval()


def own_processor(config: Any, size: int) -> Any:
    """Make the image processor that models of a type come with, for small images."""
    found = image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type, {})
    name = found.get("pil") if isinstance(found, Mapping) else found[-1]
    family = getattr(transformers, name or "ViTImageProcessorPil")
    settings: dict[str, Any] = dict(PROCESSORS.get(config.model_type, {}))
    for key in ("size", "crop_size"):
        default = getattr(family(), key, None)
        if default:
            settings[key] = dict.fromkeys(dict(default), size)
    return family(**settings)


def write_model(folder: Path, model: Any, modality: str) -> None:
    """Write a model with its tokenizer or its image processor."""
    model.save_pretrained(folder)
    if modality == "image":
        size = getattr(model.config, "image_size", 32)
        size = size if isinstance(size, int) else size[0]
        if model.config.model_type != "timm_wrapper":  # whose processor is part of the configuration
            own_processor(model.config, size).save_pretrained(folder)
        return
    tokens = tokenizer()
    accepted = inspect.signature(model.forward).parameters
    tokens.model_input_names = [n for n in ("input_ids", "token_type_ids", "attention_mask") if n in accepted]
    tokens.eos_token, tokens.bos_token = "[SEP]", "[CLS]"
    tokens.save_pretrained(folder)


def examples(modality: str, kind: str = "") -> list[Any]:
    """Give texts of different lengths, or images of different shapes."""
    if modality == "text":
        return SENTENCES
    return [draw(i, i).resize((40 if kind == "textnet" else 40 + 10 * i, 50)) for i in range(3)]


def library_inputs(folder: Path, values: list[Any]) -> Mapping[str, Tensor]:
    """Prepare inputs as transformers does."""
    if isinstance(values[0], str):
        tokens = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokens(values, return_tensors="pt", padding=True)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    return processor(values, return_tensors="pt")


def image_features(model: Any, folder: Path, images: list[Any]) -> Tensor:
    """Compute features of images as transformers does."""
    with torch.no_grad():
        output = getattr(model.eval(), "get_image_features", model)(**library_inputs(folder, images))
    return output if isinstance(output, Tensor) else output.pooler_output


assert len(WORDS) <= SMALL["vocab_size"]
