"""A model as a pipeline of diffusers: the same pictures, the usual calls, nothing half-loaded."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from matryoshka_diffusion.config import ConfigError, EncoderConfig, RunConfig, UsageError
from matryoshka_diffusion.configfile import from_dict
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.models import diffusers as export
from matryoshka_diffusion.models.diffusers import MDMNetwork, MDMPipeline, write_diffusers
from matryoshka_diffusion.models.pipeline_forms import seeds_of
from matryoshka_diffusion.models.save import without_paths
from matryoshka_diffusion.pipeline import Matryoshka
from test_pipeline import class_model, moving, plain_model, randomised
from tiny_run import tiny_config

PROMPTS = ["red apple", "a blue jay on the apple"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def text_config(encoder: EncoderConfig, features: int, **text) -> RunConfig:
    config = tiny_config(dropout=0.0)
    data = config.model_dump(mode="json")
    data["model"]["text"] |= {"features": features, **text}
    data["encoder"] = encoder.model_dump(mode="json")
    data["sampling"] |= {"steps": 3, "guidance": [2.0]}
    return from_dict(data)


@pytest.fixture(scope="module")
def t5(tiny_t5):
    return EncoderConfig(name="t5", path=str(tiny_t5))


def text_model(t5, **text):
    config = text_config(t5, 24, **text)
    return Matryoshka(randomised(config), config)


def exported(model, folder):
    write_diffusers(model, folder)
    return quiet(MDMPipeline.from_pretrained(folder))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model(t5):
    return text_model(t5)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "export"
    write_diffusers(model, folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def pipe(folder):
    return quiet(MDMPipeline.from_pretrained(folder))


@pytest.fixture(scope="module")
def class_pipe():
    return quiet(MDMPipeline.from_model(class_model()))


def seed(number):
    return torch.Generator().manual_seed(number)


def arrays(images):
    return np.stack([np.asarray(image) for image in images])


def same(output, samples):
    """Whether a pipeline's PIL images are the native samples, on every level."""
    return all(
        (arrays(level).reshape(native.shape) == native).all()
        for level, native in zip(output.levels, samples.levels, strict=True)
    )


# --- the same pictures -------------------------------------------------------------------------


def test_an_export_makes_the_pictures_of_the_native_sampler(model, pipe):
    native = model.sample(PROMPTS, n=2, seed=7)
    output = pipe(PROMPTS, num_images_per_prompt=2, generator=seed(7), height=16, width=16)
    assert same(output, native)
    assert output.images is output.levels[-1]
    assert [image.size for image in output.levels[0]] == [(8, 8)] * 4
    assert not same(pipe(PROMPTS, num_images_per_prompt=2, generator=seed(8)), native)


@pytest.mark.parametrize(
    ("make", "native", "call"),
    [
        (class_model, {"classes": ["Cat", 2], "n": 2}, {"class_labels": ["Cat", 2]}),
        (class_model, {"guidance": 2.0, "n": 2}, {"guidance_scale": 2.0}),
        (plain_model, {"n": 2}, {}),
    ],
)
def test_models_without_text_are_exported_without_an_encoder(make, native, call, tmp_path):
    pipe = exported(make(), tmp_path / "export")
    output = pipe(**call, num_inference_steps=2, num_images_per_prompt=2, generator=seed(7))
    assert same(output, make().sample(**native, steps=2, seed=7))
    assert pipe.text_encoder is pipe.tokenizer is None
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "README.md",
        "model_index.json",
        "network",
    ]
    files = [path for path in (tmp_path / "export").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1, "who reads one may read all"


def test_every_setting_of_sampling_arrives(model, pipe):
    for settings in (
        {"sampler": "ddim", "eta": 1.0},
        {"sampler": "ddpm", "grid": "log-snr"},
        {"guidance": (1.0, 3.0), "threshold": ("dynamic", "none")},
        {"guidance_interval": (-1.0, 1.0), "rescale": 0.7},
        {"negative": "jay"},
    ):
        call = {
            {"guidance": "guidance_scale", "negative": "negative_prompt"}.get(name, name): value
            for name, value in settings.items()
        }
        native = model.sample("red", seed=7, steps=4, **settings)
        assert same(pipe("red", num_inference_steps=4, generator=seed(7), **call), native)
        assert not same(pipe("red", num_inference_steps=4, generator=seed(7)), native)


def test_each_prompt_may_have_its_negative_prompt(model, pipe):
    negatives = ["jay", "apple on a jay"]
    together = pipe(PROMPTS, negative_prompt=negatives, num_images_per_prompt=2, generator=seed(7))
    for index, (prompt, negative) in enumerate(zip(PROMPTS, negatives, strict=True)):
        alone = model.sample(prompt, n=2, seed=7 + 2 * index, negative=negative).pictures
        part = arrays(together.images)[2 * index :][:2].astype(int)
        assert np.abs(part - alone).max() <= 1, "another batch"
        assert np.abs(part - model.sample(prompt, n=2, seed=7 + 2 * index).pictures).max() > 1


def test_features_of_prompts_stand_for_the_prompts(model, pipe, folder):
    """Also without a text encoder, and as the padded rows of other libraries' encoders."""
    both, away = pipe.encode_prompt(PROMPTS), pipe.encode_prompt("jay")
    named = {"prompt_embeds": both[0], "prompt_attention_mask": both[1]}
    negative = {"negative_prompt_embeds": away[0], "negative_prompt_attention_mask": away[1]}
    words = {"num_images_per_prompt": 2, "generator": seed(7)}
    native = model.sample(PROMPTS, n=2, seed=7, negative="jay")
    assert same(pipe(**named, **negative, num_images_per_prompt=2, generator=seed(7)), native)
    words["generator"] = seed(7)
    assert same(pipe(PROMPTS, **negative, **words), native)
    bare = quiet(MDMPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None))
    words["generator"] = seed(7)
    assert same(bare(**named, **negative, **words), native)
    words["generator"] = seed(7)
    padded = torch.nn.functional.pad(both[0].half(), (0, 0, 0, 3), value=7.0)
    longer = torch.nn.functional.pad(both[1].long(), (0, 3))
    named = {"prompt_embeds": padded, "prompt_attention_mask": longer}
    drawn = bare(**named, **negative, **words).images
    assert np.abs(arrays(drawn).astype(int) - native.pictures).max() <= 2, "in half precision"
    alone = bare(prompt_embeds=both[0][:1, : both[1][0].sum()], **negative, generator=seed(7))
    assert same(alone, model.sample(PROMPTS[0], seed=7, negative="jay"))
    with pytest.raises(ValueError, match=r"no text encoder: give prompt_embeds"):
        bare(PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 24)}, "prompt: give either"),
        ({"prompt": "a", "prompt_attention_mask": torch.ones(1, 2)}, "prompt: give either"),
        ({"prompt_embeds": torch.zeros(1, 2, 8)}, r"prompt_embeds are \(1, 2, 8\).*24"),
        ({"prompt_embeds": torch.zeros(0, 2, 24)}, r"prompt_embeds are \(0, 2, 24\)"),
        (
            {"prompt_embeds": torch.zeros(1, 2, 24), "prompt_attention_mask": torch.ones(1, 3)},
            r"prompt_attention_mask is \(1, 3\)",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 2, 24), "prompt_attention_mask": torch.zeros(1, 2)},
            "at least one token",
        ),
        (
            {"prompt": PROMPTS, "negative_prompt_embeds": torch.zeros(3, 2, 24)},
            "negative_prompt: give one",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_a_network_without_text_takes_no_features(class_pipe):
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        with pytest.raises(ValueError, match=f"no text: omit {name}"):
            class_pipe(**{name: torch.zeros(1, 2, 24)})
    with pytest.raises(ValueError, match="no text"):
        class_pipe.encode_prompt("a")


def test_a_pipeline_comes_from_the_hub_without_pickles_and_code(
    model, folder, tmp_path, monkeypatch
):
    asked = {}

    def snapshot_download(name, **options):
        asked.update({"name": name, **options})
        if name != "me/pipe":
            raise OSError("404")
        there = tmp_path / "cache"
        for path in folder.rglob("*"):
            own = path.relative_to(folder)
            if path.is_file() and any(own.match(form) for form in options["allow_patterns"]):
                (there / own).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, there / own)
        return str(there)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pipe = quiet(MDMPipeline.from_pretrained("me/pipe", revision="v1", token="mine"))
    assert same(pipe("red", generator=seed(7)), model.sample("red", seed=7))
    assert (asked["name"], asked["revision"], asked["token"]) == ("me/pipe", "v1", "mine")
    assert not any(form.endswith((".py", ".bin", ".pkl")) for form in asked["allow_patterns"])
    with pytest.raises(OSError, match=r"me/other.*404"):
        MDMPipeline.from_pretrained("me/other")


def test_a_picture_is_changed_as_the_native_edit_changes_it(model, pipe):
    """Image-to-image and inpainting, of a picture of another size that Pillow has opened."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8))
    hole = np.zeros((16, 16), np.uint8)
    hole[4:12, 4:12] = 255
    for given, named in (
        ({"strength": 0.5}, {"strength": 0.5}),
        ({"mask": hole}, {"mask_image": Image.fromarray(hole)}),
    ):
        native = model.edit(PROMPTS, image=picture, n=2, seed=7, **given)
        settings = {"num_images_per_prompt": 2, "generator": seed(7), "image": picture}
        assert same(pipe(PROMPTS, **settings, **named), native)
    small = picture.crop((0, 0, 16, 16))
    (whole,) = pipe("a", image=small, strength=0.0).images
    assert np.array_equal(np.asarray(whole), np.asarray(small))


@pytest.mark.parametrize("negative", [None, ["jay", "a red"]])
def test_a_network_that_sees_padding_gets_texts_of_one_length_at_a_time(t5, negative):
    model = text_model(t5, masked=False, learned_null=False)
    pipe = quiet(MDMPipeline.from_model(model))
    prompts = [PROMPTS[1], PROMPTS[0]]
    output = pipe(prompts, negative_prompt=negative, generator=seed(7))
    for index, prompt in enumerate(prompts):
        text = None if negative is None else negative[index]
        alone = model.sample(prompt, seed=7 + index, negative=text).pictures[0]
        assert np.abs(np.asarray(output.images[index]).astype(int) - alone).max() <= 1
    if negative is None:
        assert same(output, model.sample(prompts, seed=7))


# --- generators --------------------------------------------------------------------------------


def test_a_fresh_generator_stands_for_its_seed_and_a_used_one_for_a_draw(model, pipe):
    for number in (0, 7, -5, 2**63, 2**64 - 1, -(2**63)):
        first = seed(number).initial_seed()
        assert first == number % 2**64
        assert seeds_of(seed(number), 3) == (first, first + 1, first + 2)
        assert seeds_of([seed(number), seed(3)], 2) == (first, 3)
    generator, again = seed(7), seed(7)
    calls = [seeds_of(generator, 2) for _ in range(3)]
    assert calls == [seeds_of(again, 2) for _ in range(3)]
    assert len(set(calls)) == 3
    assert len(set(seeds_of([again] * 3, 3))) == 3
    assert not same(pipe("red", generator=generator), model.sample("red", seed=7))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = seeds_of(None, 2), seeds_of(None, 2)
        torch.manual_seed(0)
        assert seeds_of(None, 2) == first != second


# --- calls as users of diffusers expect them ---------------------------------------------------


def test_all_forms_of_a_picture_hold_the_same_bytes(model, pipe):
    native = model.sample("red", n=2, seed=7)
    call = {"num_images_per_prompt": 2, "generator": None}
    forms = {
        form: pipe("red", **call | {"generator": seed(7)}, output_type=form).levels
        for form in ("pil", "np", "pt", "latent")
    }
    for level, expected in enumerate(native.levels):
        assert isinstance(forms["pil"][level][0], Image.Image)
        assert (arrays(forms["pil"][level]) == expected).all()
        assert ((forms["np"][level] * 255).round() == expected).all()
        assert torch.equal(
            forms["pt"][level], torch.from_numpy(forms["np"][level]).permute(0, 3, 1, 2)
        )
        assert torch.allclose(
            forms["latent"][level].clamp(-1, 1), forms["pt"][level] * 2 - 1, atol=1 / 255 + 1e-6
        )
    images, levels = pipe("red", generator=seed(7), return_dict=False)
    assert images is levels[-1]


def test_a_callback_sees_every_step_and_may_return_nothing(pipe):
    records = []

    def look(pipeline, step, t, tensors):
        assert pipeline is pipe
        records.append((step, t, [x.shape for x in tensors["estimates"]], sorted(tensors)))

    call = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["estimates"]}
    output = pipe("red", num_inference_steps=4, generator=seed(7), output_type="np", **call)
    assert [step for step, *_ in records] == [0, 1, 2, 3]
    assert [round(t, 6) for _, t, *_ in records] == [0.75, 0.5, 0.25, 0.0]
    assert all(x[2:] == ([(1, 3, 8, 8), (1, 3, 16, 16)], ["estimates"]) for x in records)
    plain = pipe("red", num_inference_steps=4, generator=seed(7), output_type="np")
    assert (output.images == plain.images).all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("batch_size", [64, 1])
def test_latents_that_a_callback_replaces_are_gone_on_from(pipe, monkeypatch, in_place, batch_size):
    """Sampling that is given another seed's latents half-way ends at the other seed's picture."""
    monkeypatch.setattr("matryoshka_diffusion.sizes.BATCH", batch_size)
    call = {"prompt": ["red", "jay"], "num_inference_steps": 4, "sampler": "ddim"}
    copies = {}

    def keep(pipeline, step, t, tensors):
        copies[step] = tuple(z.clone() for z in tensors["latents"])
        return {}

    def swap(pipeline, step, t, tensors):
        if step != 1:
            return tensors
        if in_place:
            for z, new in zip(tensors["latents"], copies[step], strict=True):
                z.copy_(new)
            return None
        return {"latents": copies[step]}

    other = pipe(**call, generator=seed(40), callback_on_step_end=keep)
    swapped = pipe(**call, generator=seed(7), callback_on_step_end=swap)
    untouched = pipe(**call, generator=seed(7))
    assert (arrays(swapped.images) == arrays(other.images)).all()
    assert (arrays(swapped.images) != arrays(untouched.images)).any()


def test_a_callback_can_stop_and_the_next_call_is_whole(model, pipe):
    steps, copies = [], []

    def stop(pipeline, step, t, tensors):
        steps.append(step)
        copies.append(tensors["latents"][-1].clone())
        pipeline._interrupt = step == 1
        return tensors

    call = {"num_inference_steps": 4, "generator": seed(7), "output_type": "latent"}
    stopped = pipe("red", **call, callback_on_step_end=stop).images
    assert steps == [0, 1]
    assert torch.equal(stopped, copies[1])
    whole = pipe("red", num_inference_steps=4, generator=seed(7))
    assert same(whole, model.sample("red", seed=7, steps=4))


# --- folders -----------------------------------------------------------------------------------


def test_a_run_that_has_not_grown_to_all_levels_is_exported_as_it_is(tmp_path):
    config = plain_model().config
    small = config.model_copy(update={"model": config.model.first(1)})
    model = Matryoshka(randomised(small), config)
    pipe = exported(model, tmp_path / "export")
    output = pipe(generator=seed(7))
    assert len(output.levels) == 1
    assert same(output, model.sample(seed=7))
    assert pipe.network.run_config == without_paths(config)


def test_a_pipeline_draws_any_size_of_the_grid(model, pipe):
    drawn = pipe("red", height=8, width=20, generator=seed(7))
    assert drawn.images[0].size == (20, 8)
    assert same(drawn, model.sized(8, 20).sample("red", seed=7))


def test_a_folder_holds_config_and_safetensors_and_opens_under_its_old_names(model, folder, copy):
    """The class of the network has been in other modules: `model_index.json` names an old one."""
    index = json.loads((copy / "model_index.json").read_text())
    assert index["network"] == ["matryoshka_diffusion.models.diffusers", "MDMNetwork"]
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    index["network"][0] = "matryoshka_diffusion.export.network"
    (copy / "model_index.json").write_text(json.dumps(index))
    pipe = quiet(MDMPipeline.from_pretrained(copy))
    assert pipe.network.run_config == without_paths(model.config)
    assert pipe.network.run_config.encoder.path is None, "it was a folder of this computer"
    names = {path.name for path in folder.rglob("*") if path.stat().st_size > 10_000}
    assert all(name.endswith((".safetensors", ".json")) for name in names)
    pipe.save_pretrained(copy.with_name("again"))
    again = quiet(MDMPipeline.from_pretrained(copy.with_name("again")))
    assert same(again("red", generator=seed(7)), model.sample("red", seed=7))


def test_weights_of_half_precision_give_nearly_the_same_pictures(folder, model):
    dtype = torch.bfloat16
    native = model.sample("red", seed=7).pictures.astype(int)
    loaded = quiet(MDMPipeline.from_pretrained(folder, dtype=dtype))
    moved = quiet(MDMPipeline.from_pretrained(folder)).to(dtype)
    for pipe in (loaded, moved):
        assert pipe.network.dtype == pipe.text_encoder.dtype == dtype
        image = np.asarray(pipe("red", generator=seed(7)).images[0])
        assert np.abs(image - native[0]).mean() < 8
        assert (image != native[0]).any()
        assert pipe.text_encoder.dtype == dtype


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConfigError, match="is not empty: give another"):
        write_diffusers(plain_model(), tmp_path)
    with pytest.raises(ConfigError, match="precious is a file: give another"):
        write_diffusers(plain_model(), tmp_path / "precious")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    write_diffusers(plain_model(), tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_a_folder_that_cannot_be_written_to_its_end_does_not_appear(tmp_path, monkeypatch):
    def fill_the_disk(*_arguments, **_options):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(
        "diffusers.models.modeling_utils.safetensors.torch.save_file", fill_the_disk
    )
    with pytest.raises(OSError, match=r"cannot write .*export: No space left"):
        write_diffusers(plain_model(), tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_model_of_clips_is_refused(tmp_path):
    with pytest.raises(UsageError, match="draws clips"):
        write_diffusers(moving(plain_model()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_no_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder, and no id of the hub"):
        MDMPipeline.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize("component", ["network", "text_encoder"])
def test_pickles_are_not_read(copy, component, monkeypatch):
    (path,) = (copy / component).glob("*.safetensors")
    name = "pytorch_model" if component == "text_encoder" else path.stem
    torch.save(load_file(path), path.with_name(f"{name}.bin"))
    path.unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(OSError, match="no file named"):
        MDMPipeline.from_pretrained(copy)
    if component == "network":
        with pytest.raises(OSError, match="no file named"):
            MDMNetwork.from_pretrained(copy / component)


def test_components_that_do_not_belong_together_are_refused(pipe, class_pipe):
    with pytest.raises(ValueError, match="takes no text: omit"):
        MDMPipeline(class_pipe.network, pipe.text_encoder, pipe.tokenizer)
    with pytest.raises(ValueError, match="add both text_encoder and its tokenizer"):
        MDMPipeline(pipe.network, pipe.text_encoder)
    wide = transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1)
    with pytest.raises(ValueError, match="gives 8 numbers, the network takes 24"):
        MDMPipeline(pipe.network, transformers.T5EncoderModel(wide), pipe.tokenizer)


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_a_missing_package_names_its_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, export.__name__)
    with pytest.raises(MissingExtra, match=rf"package {package}: pip install .*\[diffusers\]"):
        importlib.import_module(export.__name__)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": None}, "needs a prompt"),
        ({"prompt": "a", "height": 7}, "height is 7.* 6 or 8"),
        ({"prompt": "a", "width": 31}, "width is 31"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type 'jpg'"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt"),
        ({"prompt": "a", "generator": [seed(0), seed(1)]}, "2 generators"),
        ({"prompt": "a", "smapler": "ddim"}, "smapler"),
        ({"prompt": "a", "strength": 0.5}, "strength needs a picture"),
        ({"prompt": "a", "steps": 2}, "num_inference_steps"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
        (
            {"prompt": "a", "callback_on_step_end": lambda *a: {"latents": a[3]["latents"][:1]}},
            "latents are of shapes",
        ),
    ],
)
def test_what_a_model_cannot_do_is_said(pipe, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**arguments)


def damaged(path, damage):
    """Change the weights in a file, a config or an index."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        damage(data)
        path.write_text(json.dumps(data))
        return
    weights = load_file(path)
    damage(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    "lost",
    [
        "model_index.json",
        "network/config.json",
        f"network/{WEIGHTS}",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_folder_that_lacks_something_is_refused(copy, lost):
    (copy / lost).unlink()
    with pytest.raises((OSError, ValueError)):
        MDMPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(
            (file, damage)
            for file in (f"network/{WEIGHTS}", "text_encoder/model.safetensors")
            for damage in (
                lambda w: w.pop(max(w)),
                lambda w: w.update(surplus=torch.zeros(1)),
                lambda w: w.update({max(w): torch.zeros(2, 3)}),
            )
        ),
        ("network/config.json", lambda c: c["run"]["model"].update(embeding=32)),
        ("model_index.json", lambda index: index.update({"tokenizer": [None, None]})),
        ("model_index.json", lambda index: index.update({"network": [None, None]})),
    ],
)
def test_parts_that_do_not_fit_are_refused(copy, file, damage):
    damaged(copy / file, damage)
    with pytest.raises((ValueError, OSError)):
        MDMPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    "file", ["model_index.json", "text_encoder/config.json", "network/config.json"]
)
@pytest.mark.parametrize("content", ["[]", "5", "[" * 10_000])
def test_json_of_another_form_is_named(copy, file, content):
    (copy / file).write_text(content)
    with pytest.raises((ValueError, OSError), match=str(copy)):
        MDMPipeline.from_pretrained(copy)
