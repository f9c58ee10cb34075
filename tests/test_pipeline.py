"""A trained model for people: what is loaded, what may be asked, and that seeds own pictures."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from matryoshka_diffusion.codec import Codec
from matryoshka_diffusion.conditioning import entries_of, equally_long
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.denoiser import NetworkDenoiser
from matryoshka_diffusion.models.find import count_levels, find_model
from matryoshka_diffusion.nn.costs import forward_flops
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka, passes
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.pyramid import resolution_of, up_sample
from matryoshka_diffusion.sampling import DiffusionModel
from matryoshka_diffusion.schedule import instants
from matryoshka_diffusion.text.encoder import HiddenStates
from matryoshka_diffusion.training.precision import resolve_precision
from matryoshka_diffusion.training.step import diffusion
from matryoshka_diffusion.training.trainer import Trainer
from matryoshka_diffusion.training.weights import export_weights
from ranks import start
from tiny_run import encode, tiny_config, tiny_video, with_frames

HALF = torch.tensor([0.5])


class Words:
    """The tiny run's features behind the protocol of text encoders."""

    key, width = "words", 8

    def __call__(self, captions):
        return encode(captions)


def randomised(config):
    """A network whose zero-initialised layers have weights too, so that every part speaks."""
    net = NestedUNet(config.model, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net


def text_model(*, masked=True, learned_null=True, **sampling):
    config = tiny_config(dropout=0.0)
    sampling = config.sampling.model_copy(update={"steps": 4, "guidance": (2.0,), **sampling})
    assert config.model.text is not None
    text = {"masked": masked, "learned_null": learned_null}
    model = {"text": config.model.text.model_copy(update=text)}
    model = config.model.model_copy(update=model)
    config = config.model_copy(update={"sampling": sampling, "model": model})
    return Matryoshka(randomised(config), config, encoder=Words())


def class_model(*names):
    names = names or ("cat", "dog", "eel")
    config = tiny_config(dropout=0.0)
    model = config.model.model_copy(update={"text": None, "classes": len(names)})
    data = config.data.model_copy(update={"classes": names})
    config = config.model_copy(update={"model": model, "encoder": None, "data": data})
    return Matryoshka(randomised(config), config)


def plain_model():
    config = tiny_config(dropout=0.0)
    model = config.model.model_copy(update={"text": None})
    config = config.model_copy(update={"model": model, "encoder": None})
    return Matryoshka(randomised(config), config)


def moving(model):
    """A model whose finest level has frames, with all else as here."""
    config = with_frames(model.config)
    encoder = None if config.encoder is None else Words()
    return Matryoshka(randomised(config), config, encoder=encoder)


@pytest.fixture
def exported(tmp_path):
    config = tiny_config()
    net = randomised(config)
    export_weights(tmp_path / "run" / "model", net.state_dict(), config)
    return tmp_path / "run"


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "ddim", "ddpm"])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(sampler):
    model = text_model(sampler=sampler)
    together = model.sample("red", n=16, seed=3)
    alone = model.sample("red", n=1, seed=8)
    cut = model.sample("red", n=16, seed=3, batch_size=5)
    for many, one, parts in zip(together.levels, alone.levels, cut.levels, strict=True):
        assert np.abs(many[5].astype(int) - one[0]).max() <= 1
        assert np.abs(many.astype(int) - parts).max() <= 1
    assert len(np.unique(together.pictures, axis=0)) == 16


@pytest.mark.parametrize(
    ("name", "size"),
    [("cc12m-64", 64), ("cc12m-256", 64), ("cc12m-1024", 4), ("webvid-16x256", 4)],
)
def test_a_batch_has_so_many_pixels_at_most(name, size, monkeypatch):
    """All frames of a clip count, and the pixels of latents; one sample is always drawn."""
    config = preset(name)
    model = DiffusionModel(lambda z, t, cond: z, config.model, config)
    assert model.batch_size == size
    latent = preset("openmoji", "latent")
    model = DiffusionModel(lambda z, t, cond: z, latent.model, latent)
    assert model.batch_size == 64
    monkeypatch.setattr("matryoshka_diffusion.sizes.PIXELS", 3 * 64**2)
    assert model.batch_size == 3
    monkeypatch.setattr("matryoshka_diffusion.sizes.PIXELS", 1)
    assert model.batch_size == 1


class Resting(HiddenStates):
    """The tiny run's features from an encoder that has something to free, or not."""

    key, width = "words", 8

    def __init__(self, frees):
        self.frees, self.rests = frees, 0

    def __call__(self, captions):
        return encode(captions)

    def rest(self):
        self.rests += 1
        return self.frees


class Copying(Codec):
    """Codes that are the images."""

    def encode(self, pictures):
        return pictures

    def decode(self, codes):
        return codes


@pytest.mark.parametrize("part", ["network", "codec"])
@pytest.mark.parametrize(("frees", "failures"), [(True, 1), (True, 2), (False, 1)])
def test_what_finds_no_memory_gets_that_of_the_text_encoder(frees, failures, part, monkeypatch):
    plain = text_model()
    encoder, codec = Resting(frees), Copying()
    model = Matryoshka(plain.net, plain.config, encoder=encoder, codec=codec)
    expected, calls = plain.sample("red", n=2), []
    owner, name = (model.net, "forward") if part == "network" else (codec, "decode")
    compute, first = getattr(owner, name), 3 if part == "network" else 2

    def scarce(*inputs):
        calls.append(inputs)
        if first <= len(calls) < first + failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(*inputs)

    monkeypatch.setattr(owner, name, scarce)
    if frees and failures == 1:
        assert (model.sample("red", n=2).pictures == expected.pictures).all()
    else:
        with pytest.raises(torch.OutOfMemoryError):
            model.sample("red", n=2)
    assert encoder.rests == 1


def test_a_compiled_network_draws_the_same_with_one_graph_for_each_number_of_rows(tmp_path):
    """In a process of its own: the tests' checks of shapes cannot be traced."""
    status, errors = start(draw_compiled, str(tmp_path / "results")).end()
    assert status == 0, errors
    result = json.loads((tmp_path / "results").read_text())
    assert result == {"graphs": 2, "equal": True}, "guided and not, in both batches"


def draw_compiled(path: str) -> None:
    """Compare samples with plain ones; graphs write over their last results, as CUDA graphs do."""
    graphs, sampling = [], {"steps": 6, "guidance_interval": (-1.0, 1.0), "threshold": ("none",)}
    model = text_model(**sampling)
    expected = model.sample(["red", "jay"], n=2, batch_size=2)

    def record(graph, inputs):
        graphs.append(graph)
        kept = []

        def replay(*inputs):
            outputs = graph(*inputs)
            kept.extend(outputs[len(kept) :])
            for place, new in zip(kept, outputs, strict=True):
                place.copy_(new)
            return tuple(kept)

        return replay

    model.net.compile(backend=record, fullgraph=True)
    samples = model.sample(["red", "jay"], n=2, batch_size=2)
    equal = all(map(np.array_equal, samples.levels, expected.levels))
    Path(path).write_text(json.dumps({"graphs": len(graphs), "equal": equal}))


class Casts(TorchDispatchMode):
    """Counts how often each weight of a network is converted."""

    def __init__(self, net):
        super().__init__()
        self.names = {id(weight): name for name, weight in net.named_parameters()}
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and id(args[0]) in self.names:
            self.counts[self.names[id(args[0])]] += 1
        return function(*args, **(kwargs or {}))


def sample_in_step(model):
    """Sample as the pipeline of diffusers does."""
    cond = model.condition("red", None, 3)[1]
    for _ in model.lockstep(cond, range(3), model.sampling({})):
        pass


@pytest.mark.parametrize(
    "draw", [lambda model: model.sample("red", n=3, batch_size=2), sample_in_step]
)
def test_weights_are_cast_once_for_all_steps_and_batches(draw, monkeypatch):
    """The network is made as for a preview: from the averages of a training."""
    plain = text_model()
    trainer = Trainer(diffusion(plain.config), images_seen=plain.config.train.images)
    net = trainer.network(trainer.averaged())
    model = Matryoshka(net, plain.config, encoder=Words(), precision="bf16")
    monkeypatch.setattr(type(model), "batch_size", 2)
    with Casts(model.net) as casts:
        draw(model)
    convolutions = {name for name, weight in model.net.named_parameters() if weight.ndim == 4}
    heads = {f"levels.{level}.head.weight" for level in range(2)}
    assert casts.counts.keys() >= convolutions - heads
    assert set(casts.counts.values()) == {1}


def test_every_level_comes_back_coarse_to_fine_with_captions_seeds_and_settings():
    samples = text_model().sample(["red", "blue"], n=2, seed=10, steps=3)
    assert [level.shape for level in samples.levels] == [(4, 8, 8, 3), (4, 16, 16, 3)]
    assert samples.captions == ("red", "red", "blue", "blue")
    assert samples.seeds == (10, 11, 12, 13)
    assert samples.settings["steps"] == 3
    assert samples.settings["sampler"] == "dpmpp-2m"
    json.dumps(samples.settings)


def test_of_a_batch_that_is_drawn_only_bytes_are_kept():
    plain, floats = plain_model(), []

    class Watched:
        def encode(self, pictures):
            raise NotImplementedError

        def decode(self, codes):
            decoded = codes.clone()
            floats.append(weakref.ref(decoded))
            return decoded

    def progress(done, total):
        assert all(decoded() is None for decoded in floats)

    model = Matryoshka(plain.net, plain.config, codec=Watched())
    model.sample(n=3, steps=1, batch_size=1, progress=progress)
    assert len(floats) == 3 * 2
    counts = []
    model.sample(n=3, batch_size=2, steps=2, progress=lambda *numbers: counts.append(numbers))
    assert counts == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_prompts_guidance_and_classes_change_the_picture():
    model = text_model()
    base = model.sample("red").pictures
    assert (base != model.sample("green thing").pictures).any()
    assert (base != model.sample("red", guidance=5.0).pictures).any()
    assert (base != model.sample("red", rescale=0.7).pictures).any()
    assert (base != model.sample("red", guidance_interval=(-1.0, 1.0)).pictures).any()
    noisy = model.sample("red", sampler="ddim", eta=1.0).pictures
    assert (noisy != model.sample("red", sampler="ddim").pictures).any()
    outside = model.sample("red", guidance_interval=(90.0, 91.0)).pictures
    assert (outside == model.sample("red", guidance=1.0).pictures).all()
    classes = class_model().sample(classes=["Cat", 1], steps=3, guidance=2.0)
    assert classes.captions == ("cat", "dog")
    assert (classes.pictures[0] != classes.pictures[1]).any()


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "ddim", "ddpm"])
@pytest.mark.parametrize("config", [tiny_config(dropout=0.0), tiny_video(dropout=0.0)])
def test_levels_that_wake_late_are_left_out_of_the_first_calls(config, sampler, monkeypatch):
    model, depths = Matryoshka(randomised(config), config, encoder=Words()), []
    prompts: list[str] = ["red", "a green square"]
    settings = {"sampler": sampler, "steps": 6, "guidance": (2.0, 3.0)}
    plain = model.sample(prompts, **settings)
    always = model.sample(prompts, wake=-1000.0, **settings)
    assert all(map(np.array_equal, plain.levels, always.levels))
    forward = model.net.forward
    monkeypatch.setattr(model.net, "forward", lambda z, *a: depths.append(len(z)) or forward(z, *a))
    late = model.sample(prompts, wake=(0.0, -1.0), **settings)
    assert depths == sorted(depths)
    assert {*depths} == {1, 2}
    assert late.settings["wake"] == [0.0, -1.0]
    assert (late.levels[1] != plain.levels[1]).any()
    alone = model.sample(prompts[1], seed=1, wake=-1.0, **settings)
    assert np.abs(late.levels[1][1].astype(int) - alone.levels[1][0]).max() <= 1


@pytest.mark.parametrize("wake", [None, -1.0])
def test_the_arithmetic_of_a_sample_is_counted_as_the_network_does_it(wake):
    model, settings = class_model(), {"steps": 6, "guidance": (1.0, 3.0), "wake": wake}
    with FlopCounterMode(display=False) as counter:
        model.sample(classes=0, **settings)
    counts = passes(model, model.sampling(settings))
    assert set(counts) == ({2} if wake is None else {1, 2})
    each = (count * forward_flops(model.model, levels) for levels, count in counts.items())
    assert sum(each) == counter.get_total_flops()


def test_a_level_that_never_wakes_is_refused_but_in_a_single_step_it_is_enlarged():
    model = class_model()
    with pytest.raises(UsageError, match="level 1 asleep in all 2 steps"):
        model.sample(classes=0, wake=50.0, steps=2)
    levels = model.sample(classes=0, wake=50.0, steps=1, sampler="ddim").levels
    coarse, fine = (torch.from_numpy(level).movedim(-1, 1).double() for level in levels)
    assert (up_sample(coarse, resolution_of(fine)) - fine).abs().max() <= 1.0, "in bytes"


def test_a_number_is_the_place_of_a_class_and_a_string_its_name():
    names = sorted(str(number) for number in range(12))  # as folders are read: 0, 1, 10, 11, 2, ...
    model = class_model(*names)

    def labels(*classes):
        _, cond = model.condition(None, classes, 1)
        assert cond.labels is not None
        return cond.labels.tolist()

    assert labels(*range(12)) == labels(*names) == list(range(12))
    assert labels("2", 2) == [4, 2]
    assert class_model("1", "2", "3").condition(None, "0", 1)[0] == ("1",)  # no class is called so
    for outside in (12, -1):
        with pytest.raises(UsageError, match=f"unknown class {outside}; there are: 0, 1, 10"):
            labels(outside)


def test_a_network_without_a_null_is_guided_by_the_empty_caption():
    model = text_model(learned_null=False, steps=3, guidance=(1.0,))
    for prompt, same in (("red", False), ("", True)):
        guided = model.sample(prompt, guidance=4.0).pictures
        assert (guided == model.sample(prompt).pictures).all() == same


@pytest.mark.parametrize("options", [{}, {"masked": False}, {"learned_null": False}])
def test_one_call_for_both_halves_of_guidance_is_two_calls(options):
    model = text_model(**options) if options else class_model()
    words = (["red", "a green square"], None) if options else (None, ["cat", "dog"])
    _, cond = model.condition(*words, 1)
    sampling, [now] = model.sampling({"guidance": 3.0}), instants(HALF, model.process.schedules)
    cond, without = equally_long(cond, model.unconditional(cond))
    z = model.noise([1, 2], "cpu").start()
    one, other = (
        NetworkDenoiser(model.net, model.process, each)(z, now) for each in (cond, without)
    )
    together = model.denoiser(cond, sampling.model_copy(update={"threshold": ("none",)}))(z, now)
    for c, u, guided in zip(one, other, together, strict=True):
        assert (c - u).abs().max() > 0.01
        torch.testing.assert_close(guided, u + 3.0 * (c - u), rtol=1e-4, atol=1e-5)


def test_a_negative_prompt_takes_the_place_of_no_prompt():
    model = text_model(steps=2, guidance=(3.0,))
    plain = model.sample("red", n=2)
    led = model.sample("red", n=2, negative="blue thing")
    assert (led.pictures != plain.pictures).any()
    assert led.settings["negative"] == "blue thing"
    nowhere = model.sample("red", n=2, negative="red")
    unguided = model.sample("red", n=2, guidance=1.0)
    assert np.abs(nowhere.pictures.astype(int) - unguided.pictures).max() <= 1


def test_a_network_that_sees_padding_samples_texts_of_one_length_together():
    model = text_model(masked=False, learned_null=False, steps=2)
    prompts = ["red", "a green square", "blue thing", "red red red"]
    together = model.sample(prompts, seed=5)
    for place, prompt in enumerate(prompts):
        alone = model.sample(prompt, seed=5 + place)
        assert np.abs(alone.pictures[0].astype(int) - together.pictures[place]).max() <= 1


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (text_model, {}, "needs a prompt"),
        (text_model, {"prompts": "a", "classes": "cat"}, "takes no classes: it takes prompts"),
        (class_model, {"prompts": "a"}, "takes no prompts: it takes classes"),
        (class_model, {"classes": "cow"}, "unknown class 'cow'; there are: cat, dog, eel"),
        (class_model, {"classes": 3}, "unknown class 3"),
        (class_model, {"classes": "²"}, "unknown class"),
        (class_model, {"classes": []}, "classes is empty"),
        (text_model, {"prompts": []}, "prompts is empty"),
        (class_model, {"n": 0}, "n is 0"),
        (class_model, {"n": -1}, "n is -1"),
        (class_model, {"n": 99_999_999_999_999}, r"-n\).*--seed"),
        (text_model, {"prompts": "a", "n": 99_999_999_999_999}, r"-n\).*--seed"),
        (class_model, {"batch_size": 0}, "batch_size is 0"),
        (class_model, {"steps": 10**14}, "sampling.steps"),
        (class_model, {"steps": 1001, "grid": "released"}, "1,001.*trailing"),
        (text_model, {"prompts": "a \ud800"}, "not UTF-8"),
        (text_model, {"prompts": "a", "negative": "b", "guidance": 1.0}, "needs guidance"),
        (class_model, {"negative": "b", "guidance": 2.0}, "takes no negative prompt: it takes cl"),
        (plain_model, {"guidance": 2.0}, "is unconditional"),
        (
            class_model,
            {"smapler": "ddim"},
            r"sampling.smapler: unknown key \(did you mean sampling",
        ),
        (class_model, {"cfg": 2.0}, r"did you mean sampling\.guidance\?"),
        (class_model, {"steps": 0}, "sampling.steps"),
        (
            class_model,
            {"guidance": (1.0, 2.0, 3.0)},
            "sampling.guidance has 3 entries; give 1 or 2",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_said(make, arguments, message):
    with pytest.raises(UsageError, match=message):
        make().sample(**arguments)


@pytest.mark.parametrize("value", [["a", None], ("a", ["b"]), 5, 0.5, [b"a"]])
def test_what_is_no_text_is_named_with_its_place(value):
    """Past the checks of types, which only the tests have."""
    with pytest.raises(UsageError, match=r"prompts\[[01]\] is .*text"):
        entries_of("prompts", value, str)


def test_an_exported_model_loads_and_a_damaged_one_is_refused(exported):
    model = Matryoshka.load(exported)
    assert model.precision == resolve_precision("auto", torch.device("cpu"))
    model._frozen["encoder"] = Words()
    assert model.sample("red", steps=2).pictures.shape == (1, 16, 16, 3)
    weights = exported / "model" / "model.safetensors"
    data = weights.read_bytes()
    for cut in (0, 5, 100, len(data) - 1):
        weights.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
            Matryoshka.load(exported)
    weights.write_bytes(data)
    config = exported / "model" / "config.json"
    text = config.read_text()
    config.write_text(text[:50])
    with pytest.raises(ValueError, match=r"config\.json: no valid JSON"):
        Matryoshka.load(exported)
    other = json.loads(text)
    other["model"]["levels"][1]["widths"] = [64, 32]
    config.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"does not fit the network: .*levels\.1"):
        Matryoshka.load(exported)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: missing"):
        Matryoshka.load(exported)


def test_what_is_no_model_is_said(tmp_path):
    for keys in ([], ["conditioner.null"], ["levels.x.stem"]):
        with pytest.raises(ValueError, match="no level of a nest"):
            count_levels(dict.fromkeys(keys, torch.zeros(1)))
    with pytest.raises(FileNotFoundError, match="no such folder, and no shipped model"):
        find_model("nowhere")
    with pytest.raises(FileNotFoundError, match="neither a model nor a checkpoint"):
        find_model(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.bin: it is no checkpoint"):
        find_model(tmp_path / "x.bin")
