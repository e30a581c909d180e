"""Settings of models that decide what they read: channels of images, padding of texts, sizes of towers."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from architectures import examples, randomised, write_model
from conftest import draw
from test_architectures import adamerge_logits, assert_same, library_logits
from test_towers import _small_trunks, small_config, write_open_clip  # noqa: F401  # a fixture
from tiny_networks import SIZES, WORDS, tokenizer
from torch.testing import assert_close

from adamerge.checkpoints import open_checkpoint
from adamerge.errors import InputError
from adamerge.models import open_backbone

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own


def write_vit(folder: Path, channels: int, n_values: int) -> None:
    config = transformers.ViTConfig(**SIZES, image_size=14, patch_size=7, num_channels=channels, num_labels=3)
    randomised(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    values = {"image_mean": [0.4] * n_values, "image_std": [0.2] * n_values}
    size = {"height": 14, "width": 14}
    transformers.ViTImageProcessorPil(size=size, **values).save_pretrained(folder)


def write_timm(folder: Path, channels: int, n_values: int) -> Any:
    model = randomised(timm.create_model("test_vit", num_classes=3, in_chans=channels))
    cfg = {"input_size": (channels, 160, 160), "mean": (0.4,) * n_values, "std": (0.2,) * n_values}
    model.pretrained_cfg.update(cfg)
    timm.models.save_for_hf(model, folder, model_args={"in_chans": channels}, safe_serialization=True)
    return model


def test_a_vit_of_one_channel_reads_grey_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_vit(tmp_path, 1, 1)
    grey = [image.convert("L") for image in examples("image")]
    expected = library_logits(tmp_path, "image", grey)
    for images in (grey, examples("image")):
        assert_same(adamerge_logits(tmp_path, tmp_path, images, 3), expected)


def test_a_timm_model_of_one_channel_reads_grey_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = write_timm(tmp_path, 1, 1)
    settings = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    transform: Any = timm.data.create_transform(**settings)
    with torch.no_grad():
        expected = model(torch.stack([transform(image.convert("L")) for image in examples("image")]))
    assert_same(adamerge_logits(tmp_path, tmp_path, examples("image"), 3), expected)


@pytest.mark.parametrize(
    ("write", "channels", "n_values"),
    [(write_vit, 1, 3), (write_vit, 2, 2), (write_vit, 4, 4), (write_timm, 2, 2), (write_timm, 4, 4)],
)
def test_other_channels_are_refused_by_their_number(
    write: Any, channels: int, n_values: int, tmp_path: Path
) -> None:
    write(tmp_path, channels, n_values)
    with pytest.raises(InputError, match=f"{channels} channels"):
        open_backbone(tmp_path)


class TestPadding:
    """GPT-2 and its like classify by the last token before the padding."""

    def write(self, folder: Path, pad: str | None, pad_id: int | None) -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": len(WORDS), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
        config = transformers.GPT2Config(**sizes, num_labels=3, pad_token_id=pad_id, eos_token_id=3)
        model = randomised(transformers.GPT2ForSequenceClassification(config))
        write_model(folder, model, "text")
        tokens = tokenizer()
        tokens.pad_token, tokens.eos_token = pad, "[SEP]"
        tokens.backend_tokenizer.post_processor = None
        tokens.save_pretrained(folder)
        return model

    @pytest.mark.parametrize(("pad", "pad_id"), [("[PAD]", 0), ("[PAD]", None), ("[PAD]", 5), (None, None)])
    def test_each_text_gets_what_it_gets_alone(
        self, pad: str | None, pad_id: int | None, tmp_path: Path
    ) -> None:
        model = self.write(tmp_path, pad, pad_id)
        texts = ["a good b", "bad", "c red d blue a b c d"]
        found = adamerge_logits(tmp_path, tmp_path, texts, 3)
        model.config.pad_token_id = None
        tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)
        with torch.no_grad():
            alone = [model(tokens(text, return_tensors="pt").input_ids).logits for text in texts]
        assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_a_tower_whose_trunk_reads_one_size_gets_images_of_that_size(
    tmp_path: Path,
) -> None:
    """open_clip's own preprocessing gives it images of the configured size, which it refuses."""
    config = small_config("EVA02-B-16")
    config["vision_cfg"]["image_size"] = 32
    model = write_open_clip(tmp_path / "model", config)
    backbone, state = open_backbone(tmp_path / "model"), open_checkpoint(tmp_path / "model")
    batch = backbone.preprocess(draw(1, 0))[None]
    assert batch.shape == (1, 3, 224, 224)
    with torch.no_grad():
        expected = model.encode_image(backbone.normalised(batch), normalize=False)
    assert_close(backbone.features({n: state[n] for n in backbone.names}, batch), expected)


@pytest.mark.parametrize("kernels", ["flash_attention_2", "paged|sdpa", "flex_attention", "of_mine", 3])
def test_kernels_are_the_librarys_choice(kernels: Any, tmp_path: Path) -> None:
    write_vit(tmp_path, 3, 3)
    expected = adamerge_logits(tmp_path, tmp_path, examples("image"), 3)
    settings = json.loads((tmp_path / "config.json").read_text()) | {
        "_attn_implementation": kernels,
        "_experts_implementation": kernels,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert torch.equal(adamerge_logits(tmp_path, tmp_path, examples("image"), 3), expected)
