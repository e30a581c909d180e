"""At how many tokens texts are cut: by the model's own files, or by the user; pairs, and sides of padding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_hf_encoder import SENTENCES
from tiny_networks import WORDS, make_hf, texts, tokenizer, write_hf
from torch.testing import assert_close

from adamerge import MultiTaskData, TaskSpec
from adamerge.checkpoints import open_checkpoint
from adamerge.errors import AdamergeWarning, InputError
from adamerge.models import ModuleBackbone, open_backbone

LONG = "a b c d " * 20


def written(folder: Path, config: Any = None, length: int | None = None, **settings: Any) -> Path:
    """Write a model, its tokenizer with a length of its own, and what sentence-transformers adds."""
    write_hf(folder, make_hf(config or texts("Bert")))
    if length is not None:
        own = tokenizer()
        own.model_max_length = length
        own.save_pretrained(folder)
    if settings:
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


def length_of(folder: Path) -> int:
    return json.loads(open_backbone(folder).transform_key)["max_length"]


class TestOwnLengths:
    @pytest.mark.parametrize(
        ("positions", "own", "settings", "expected"),
        [
            (24, None, {}, 24),
            (24, 20, {}, 20),
            (24, 20, {"max_seq_length": 12}, 12),
            (24, 12, {"max_seq_length": 20}, 12),
            (24, None, {"max_seq_length": None}, 24),
            (400, None, {"max_seq_length": 300}, 300),
        ],
    )
    def test_the_smallest_that_a_file_tells_stands(
        self, tmp_path: Path, positions: int, own: int | None, settings: dict[str, Any], expected: int
    ) -> None:
        config = texts("Bert", max_position_embeddings=positions)
        assert length_of(written(tmp_path, config, own, **settings)) == expected

    @pytest.mark.parametrize("kind", ["Roberta", "MPNet", "XLMRoberta"])
    def test_positions_behind_the_paddings_own(self, tmp_path: Path, kind: str) -> None:
        written(tmp_path, texts(kind, max_position_embeddings=24, pad_token_id=1))
        assert length_of(tmp_path) == 22
        backbone = open_backbone(tmp_path)
        tokens = torch.stack([backbone.preprocess(LONG)])
        assert backbone.features(dict(open_checkpoint(tmp_path)), tokens).isfinite().all()

    def test_a_model_without_limit_has_a_length_all_the_same(self, tmp_path: Path) -> None:
        config = transformers.XLNetConfig(vocab_size=len(WORDS), d_model=16, n_layer=1, n_head=2, d_inner=24)
        assert length_of(written(tmp_path, config)) == 512
        texts_of = open_backbone(tmp_path).preprocessing(2000)[0]
        assert texts_of(LONG).shape[1] == 2000

    def test_texts_are_lowered_where_the_settings_say_so(self, tmp_path: Path) -> None:
        written(tmp_path / "lower", do_lower_case=True)
        written(tmp_path / "as_is", do_lower_case=False)
        lower, as_is = (open_backbone(tmp_path / name) for name in ("lower", "as_is"))
        assert torch.equal(lower.preprocess("GOOD a"), as_is.preprocess("good a"))
        assert not torch.equal(as_is.preprocess("GOOD a"), as_is.preprocess("good a"))
        assert lower.transform_key != as_is.transform_key


class TestSettings:
    @pytest.mark.parametrize("wrong", [0, 2, 25])
    def test_what_the_model_cannot_read_is_refused(self, tmp_path: Path, wrong: int) -> None:
        backbone = open_backbone(written(tmp_path, length=20))
        message = f"max_length={wrong}: this model reads . to 24 tokens .*\nLeave it out .* length, 20."
        with pytest.raises(InputError, match=message):
            backbone.preprocessing(wrong)
        assert backbone.preprocessing(24)[0](LONG).shape == (2, 24)

    def test_images_have_no_length(self) -> None:
        with pytest.raises(InputError, match="max_length=8: this model reads images"):
            ModuleBackbone(torch.nn.Identity()).preprocessing(8)
        with pytest.raises(InputError, match="max_length=0"):
            MultiTaskData({"x": TaskSpec("memory")}, max_length=0)

    def data(self, tmp_path: Path, **options: Any) -> MultiTaskData:
        (tmp_path / "x.txt").write_text("\n".join(["a good b", LONG, "bad " * 15]))
        data = MultiTaskData({"x": TaskSpec(str(tmp_path / "x.txt"))}, holdout=0.0, **options)
        data.use(open_backbone(written(tmp_path / "model")))
        return data

    def test_cut_texts_are_counted(self, tmp_path: Path) -> None:
        message = r"task 'x', adaptation texts: 1 of 3 texts is cut at 24 tokens \(the longest has 82\); data"
        with pytest.warns(AdamergeWarning, match=message):
            images = self.data(tmp_path).adaptation("x").images
        assert images.shape == (3, 2, 24)
        message = "2 of 3 texts are cut at 10 tokens"
        with pytest.warns(AdamergeWarning, match=message):
            images = self.data(tmp_path, max_length=10).adaptation("x").images
        assert images.shape == (3, 2, 10)

    def test_texts_are_padded_no_further_than_the_longest_needs(self, tmp_path: Path) -> None:
        backbone = open_backbone(written(tmp_path / "m", texts("Bert", max_position_embeddings=400)))
        (tmp_path / "x.txt").write_text("\n".join(SENTENCES))
        data = MultiTaskData({"x": TaskSpec(str(tmp_path / "x.txt"))}, holdout=0.0)
        data.use(backbone)
        images = data.adaptation("x")
        whole = torch.stack([backbone.preprocess(text) for text in SENTENCES])
        assert (whole.shape, images.images.shape) == ((3, 2, 400), (3, 2, 16))
        weights = dict(open_checkpoint(tmp_path / "m"))
        assert torch.equal(backbone.features(weights, images.images), backbone.features(weights, whole))


class TestPairsAndPadding:
    def test_a_pair_is_tokenised_as_the_tokenizer_has_it(self, tmp_path: Path) -> None:
        backbone = open_backbone(written(tmp_path))
        tokens = backbone.preprocess(("a good", "bad b"))
        expected = tokenizer()("a good", "bad b")["input_ids"]
        assert tokens[0, : len(expected)].tolist() == expected
        assert int(tokens[1].sum()) == len(expected)
        assert not torch.equal(tokens, backbone.preprocess(("bad b", "a good")))

    @pytest.mark.parametrize("value", [None, 3, ("a", None), ("a", "b", "c"), [], "\ud800"])
    def test_what_is_no_text_is_refused(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(ValueError, match="no text|surrogates"):
            open_backbone(written(tmp_path)).preprocess(value)

    def test_the_tokenizers_own_side_is_padded(self, tmp_path: Path) -> None:
        """XLNet reads the last token, so that its padding is on the left."""
        config = transformers.XLNetConfig(
            vocab_size=len(WORDS), d_model=16, n_layer=1, n_head=2, d_inner=24, pad_token_id=0
        )
        model = make_hf(config, n_classes=3)
        write_hf(tmp_path, model)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
        own = tokenizer()
        backbone = open_backbone(tmp_path)
        texts_of = backbone.preprocessing(None)[0]
        whole = torch.stack([backbone.preprocess(text) for text in SENTENCES])
        short = texts_of.stack([texts_of.shorten(tokens) for tokens in whole])
        assert whole[0, 1].tolist()[-5:] == [1] * 5
        assert short.shape[-1] == 16
        weights = dict(open_checkpoint(tmp_path))
        alone = torch.cat([backbone.features(weights, row[None]) for row in whole])
        assert_close(backbone.features(weights, short), alone, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            expected = torch.cat([model(**own(text, return_tensors="pt")).logits for text in SENTENCES])
        head = model.logits_proj
        assert_close(head(alone), expected, atol=1e-5, rtol=1e-5)
