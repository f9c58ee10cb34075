"""Released checkpoints: read as data, checked whole, converted a tensor at a time."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.data.loader import to_float, to_uint8
from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.models.released import convert, load_released, read_released
from matryoshka_diffusion.models.released_pickle import BrokenFile, Record, plain, read_pickle
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset

FILE = Path(__file__).parent / "data" / "reference" / "vis_model_nested32.pth"
CONFIG = json.loads(FILE.with_name("nested32.json").read_text())


class Evil:
    """Reading its pickle makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


class EvilCode(Evil):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.canary)!r})",)


def rewritten(path: Path, change) -> Path:
    """The released file with its pickle put through `change`."""
    with zipfile.ZipFile(FILE) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return path


def saved(path: Path, **content) -> Path:
    torch.save(content, path)
    return path


def tensors() -> dict[str, torch.Tensor]:
    weights = read_released(FILE).weights
    return {name: weights.read(name) for name in weights.like}


# --- what fits ---------------------------------------------------------------------------------


def test_every_way_to_give_the_weights_loads_the_same_network(tmp_path):
    save_file(tensors(), tmp_path / "weights.safetensors")
    torch.save(tensors(), tmp_path / "bare.pth")
    first, process = load_released(FILE)
    for weights in (FILE, tensors(), tmp_path / "weights.safetensors", tmp_path / "bare.pth"):
        net, other = load_released(weights, CONFIG)
        assert net.config == first.config
        assert other.prediction == process.prediction == "v"
        for name, value in net.state_dict().items():
            assert torch.equal(value, first.state_dict()[name])
    assert first.training is False
    assert all(p.requires_grad for p in first.parameters())


def test_the_network_is_an_ordinary_one():
    net, _ = load_released(FILE)
    z = tuple(torch.zeros(2, 3, side, side) for side in (16, 32))
    cond = Conditioning(
        tokens=torch.zeros(2, 4, 24),
        mask=torch.ones(2, 4, dtype=torch.bool),
        micro={"scale": torch.full((2,), 32.0)},
    )
    shapes = [y.shape for y in net(z, torch.full((2,), 0.5), cond)]
    assert shapes == [(2, 3, 16, 16), (2, 3, 32, 32)]


def test_loaded_weights_are_a_copy():
    mine = tensors()
    net, _ = load_released(mine, CONFIG)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert any(value.any() for value in mine.values())


@pytest.mark.parametrize("name", ["released-64", "released-256", "released-1024"])
def test_the_three_released_models_are_told_by_their_keys(name):
    side = name.removeprefix("released-")
    shapes = json.loads((FILE.parent / f"cc12m_{side}x{side}.keys.json").read_text())
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in shapes.items()}
    assert read_released(weights).config == preset(name)


def test_another_width_of_text_is_given_by_hand(tmp_path):
    shapes = json.loads((FILE.parent / "cc12m_64x64.keys.json").read_text())
    shapes["lm_proj.weight"][1] = 512
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in shapes.items()}
    with pytest.raises(BrokenFile, match="project"):
        read_released(weights)
    config = read_released(weights, text_dim=512).config
    assert config.model.text is not None
    assert config.model.text.features == 512


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schedule_type": "COSINE"}, ("truncated-cosine", "v", "eps", "clip", 1.0)),
        ({"schedule_type": 2}, ("linear-beta", "v", "eps", "clip", 1.0)),
        ({"prediction_type": "DDPM"}, ("squared-cosine", "eps", "eps", "clip", 1.0)),
        ({"loss_target_type": "V_PREDICTION"}, ("squared-cosine", "v", "v", "clip", 1.0)),
        ({"threshold_function": "DYNAMIC"}, ("squared-cosine", "v", "eps", "dynamic", 1.0)),
        ({"threshold_function": 0}, ("squared-cosine", "v", "eps", "none", 1.0)),
        ({"schedule_shifted_power": 2}, ("squared-cosine", "v", "eps", "clip", 2.0)),
        ({"schedule_shifted": False}, ("squared-cosine", "v", "eps", "clip", 0.0)),
    ],
)
def test_the_process_follows_the_run_configuration(change, expected):
    config = {**CONFIG, "diffusion_config": {"sampler_config": change}}
    run = read_released(FILE, config).config
    assert expected == (
        run.model.schedule,
        run.process.prediction,
        run.process.weighting[0].name,
        run.sampling.threshold[0],
        run.model.levels[-1].shift_power,
    )


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet_config", {"temporal_mode": True}, "temporal_mode is True"),
        ("unet_config", {"resolution_channels": None}, "no run configuration"),
        ("sampler", {"num_diffusion_steps": 100}, "num_diffusion_steps is 100"),
        ("sampler", {"threshold_function": "DYNAMIC_IF"}, "DYNAMIC_IF"),
    ],
)
def test_what_no_released_model_uses_is_refused(part, change, message):
    config = dict(CONFIG)
    if part == "sampler":
        config["diffusion_config"] = {"sampler_config": change}
    else:
        config[part] = {**CONFIG[part], **change}
    with pytest.raises(ValueError, match=message):
        read_released(FILE, config)


def test_a_config_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no unet_config"):
        load_released(FILE, {"model": "nested"})


def test_released_pixels_go_there_and_back():
    pixels = torch.arange(256).to(torch.uint8).numpy()
    x = to_float(pixels, "released")
    assert x[127] == 0.0
    assert x[255] == 1.0
    assert (to_uint8(x, "released").numpy() == pixels).all()
    assert to_uint8(torch.tensor([-0.004, 2.0, -2.0]), "released").tolist() == [126, 255, 0]


# --- what does not fit -------------------------------------------------------------------------


def without(state, key):
    del state[key]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: without(s, "conv_in.bias"), "levels.1.stem.bias is missing"),
        (lambda s: s.update(surprise=torch.zeros(3)), "surprise: not a key"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(33)}), r"is \(33,\)"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(32).half()}), "float16, not"),
        (lambda s: s.update({"conv_in.bias": 3}), "conv_in.bias', which is no tensor"),
        (lambda s: s.clear(), "holds no state_dict"),
    ],
)
def test_a_checkpoint_fits_or_is_refused(damage, message, tmp_path):
    state = tensors()
    damage(state)
    path = saved(tmp_path / "x.pth", state_dict=state)
    with pytest.raises(BrokenFile, match=message) as caught:
        load_released(path, CONFIG)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def empty_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def packed(path):
    with zipfile.ZipFile(FILE) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def flipped(path):
    data = bytearray(FILE.read_bytes())
    data[len(data) // 2] ^= 0xFF  # in the numbers of a tensor
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(FILE.read_bytes()[:-1000]), "cut short"),
        (lambda p: p.write_bytes(random.Random(0).randbytes(100_000)), "cut short"),
        (lambda p: p.write_bytes(b""), "cut short"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "no checkpoint of torch.save"),
        (empty_zip, "0 data.pkl in it"),
        (packed, "packed"),
        (flipped, "damaged"),
        (lambda p: rewritten(p, lambda data: data[:5000]), "pickle is damaged"),
        (lambda p: rewritten(p, lambda _: pickle.dumps([1])), "holds no state_dict"),
        (lambda p: rewritten(p, lambda _: b"\x80\x02r\xff\xff\xff\x7f."), "pickle is damaged"),
        (lambda p: rewritten(p, lambda _: b"\x80\x02" + b"]" * 400_001), "takes more than"),
        (lambda p: rewritten(p, lambda _: b"0" * (2**24 + 1)), "too large"),
    ],
)
def test_a_file_that_is_something_else_is_one_clear_error(make, message, tmp_path):
    path = tmp_path / "x.pth"
    make(path)
    with pytest.raises(BrokenFile, match=message) as caught:
        load_released(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 70)
        + b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,39999996]}}   ',
    ],
)
def test_a_broken_safetensors_file_is_one_clear_error(data, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(BrokenFile, match=f"^{re.escape(str(path))}: it "):
        load_released(path)


def hostile_pickles():
    """Small pickles that ask for much: work, memory, or names that hold themselves."""
    start, end = b"\x80\x02", b"."
    many = b"(" + b"K\x01" * 50_000
    calls = b"cx\ny\nq\x01" + b"h\x00R0h\x01" * 2_000
    yield start + many + b"tq\x000" + calls + end
    pairs = b"}(" + b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(50_000)) + b"u"
    yield start + pairs + b"q\x000" + b"cx\ny\n)\x81q\x01" + b"h\x00b" * 2_000 + end
    name = b"X" + struct.pack("<I", 2_000_000) + b"a" * 2_000_000 + b"q\x000"
    yield b"\x80\x04" + name + b"h\x00h\x00\x930" * 2_000 + b"N" + end
    sets = b"c__builtin__\nset\nq\x01" + b"h\x01h\x00\x85R0" * 1_000 + b"N"
    yield start + many + b"lq\x000" + sets + end
    alike = [(n * (2**61 - 1)).to_bytes(11, "little") for n in range(1, 60_000)]
    yield start + b"}(" + b"".join(b"\x8a\x0b" + x + b"N" for x in alike) + b"u" + end
    doubled = b"]q\x00" + b"]q\x01(h\x00h\x00e0h\x01q\x00" * 60
    args = b"}(X\x0a\x00\x00\x00state_dict}X\x04\x00\x00\x00args}"
    yield start + doubled + b"0" * 61 + args + b"cx\ny\nh\x00\x85RK\x01su" + end


def test_small_hostile_files_take_little(tmp_path):
    """In a process of its own, whose memory is measured and which must not hang."""
    paths = [
        rewritten(tmp_path / f"{number}.pth", lambda _, data=data: data)
        for number, data in enumerate(hostile_pickles())
    ]
    script = """
import resource, signal, sys
from matryoshka_diffusion.models.released import load_released
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    signal.alarm(20)
    try:
        load_released(path)
    except ValueError as error:
        assert str(error).startswith(path), error
        print(error)
    else:
        raise SystemExit(path + " was read")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert after - before < 200 * 1024, (before, after)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(paths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolutions": [32, 0]}, "no run configuration"),
        ({"unet_config": {"micro_conditioning": "scale:9999999999999"}}, "micro_conditioning"),
        ({"unet_config": {"temporal_dim": 10**30}}, "no network of the released code"),
        ({"unet_config": {"resolution_channels": [33, 32]}}, "multiple of"),
        ({"unet_config": {"resnet_config": {"num_groups_norm": 16}}}, "num_groups_norm is 16"),
        ({"unet_config": {"num_attention_layers": [0, 1]}}, "differs between levels"),
        ({"diffusion_config": {"use_vdm_loss_weights": True}}, "use_vdm_loss_weights is True"),
        ({"diffusion_config": {"sampler_config": {"num_diffusion_steps": 0}}}, "steps is 0"),
        ({"diffusion_config": {"sampler_config": {"schedule_type": "x" * 10**6}}}, "KeyError"),
    ],
)
def test_a_hostile_configuration_is_one_clear_error(change, message):
    config = {**CONFIG, **change}
    if "unet_config" in change:
        config["unet_config"] = {**CONFIG["unet_config"], **change["unet_config"]}
    with pytest.raises(ValueError, match=message) as caught:
        load_released(FILE, config)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_level_weights_are_turned_from_coarse_to_fine():
    config = {**CONFIG, "diffusion_config": {"multi_res_weights": "4:1"}}
    assert load_released(FILE, config)[1].level_weights == (1.0, 4.0)


def test_tensors_that_share_their_numbers_are_refused(tmp_path):
    shared = torch.zeros(100_000)
    path = saved(tmp_path / "x.pth", state_dict={str(n): shared for n in range(30)})
    with pytest.raises(BrokenFile, match="more than the file"):
        read_released(path)


def test_a_network_of_too_many_layers_is_not_built():
    unet = {**CONFIG["unet_config"], "inner_config": {**CONFIG["unet_config"]["inner_config"]}}
    unet["inner_config"]["num_lm_head_layers"] = 60_000
    with pytest.raises(BrokenFile, match=r"60,0\d\d layers"):
        read_released(FILE, {**CONFIG, "unet_config": unet})


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file"):
        load_released("nowhere.pth")


# --- nothing is run ----------------------------------------------------------------------------


@pytest.mark.parametrize("evil", [Evil, EvilCode])
@pytest.mark.parametrize("place", ["args", "deep", "state_dict", "top"])
def test_nothing_that_a_file_names_is_called(evil, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    canary = tmp_path / "canary"
    state = tensors()
    content = {
        "args": {"state_dict": state, "args": evil(canary)},
        "deep": {"state_dict": state, "args": {**CONFIG, "x": [evil(canary)]}},
        "state_dict": {"state_dict": {**state, "extra": evil(canary)}},
        "top": evil(canary),
    }[place]
    path = tmp_path / "x.pth"
    torch.save(content, path)
    fits = place == "deep"  # the others have no run configuration, or no state
    for arguments, status in (
        (["info", path], 0 if fits else 1),
        (["convert", path, "-o", tmp_path / "out"], 0 if fits else 1),
        (["sample", path, "-p", "a", "--text-encoder", tmp_path / "none"], 1),
        (["export", path, "-o", tmp_path / "out2"], 0 if fits else 1),
        (["grow", path, "--to", "64", "--out", tmp_path / "out3"], 0 if fits else 1),
    ):
        assert cli.main([str(word) for word in arguments]) == status, arguments
        assert not canary.exists()
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    assert (str(canary) in told.out) == fits, "info shows what the file asks for"
    torch.load(path, weights_only=False)
    assert canary.is_dir(), "the canary can sing"


def test_a_record_keeps_what_it_was_given():
    record = read_pickle(pickle.dumps({"x": Evil(Path("here")), "y": Path("a/b")}, protocol=2))
    assert isinstance(record["x"], Record)
    assert record["x"].name.endswith(".mkdir")
    assert record["x"].args == ("here",)
    assert record["y"].args == ("a", "b")
    assert not Path("here").exists()


def test_a_small_pickle_that_describes_billions_is_refused():
    bomb: list = []
    for _ in range(40):
        bomb = [bomb, bomb]
    with pytest.raises(BrokenFile, match="too large"):
        plain(read_pickle(pickle.dumps(bomb)))
    knot: tuple = ()
    for _ in range(60):
        knot = (knot, knot)
    data = b"\x80\x02}" + pickle.dumps(knot, protocol=2)[2:-1] + b"K\x01s."
    assert read_pickle(data) == {"<tuple>": 1}


def test_mutated_pickles_give_clean_errors():
    """Two thousand of them; every one is read as some data or refused."""
    with zipfile.ZipFile(FILE) as archive:
        original = archive.read("vis_model_nested32/data.pkl")
    short = original[:2000] + original[-3000:]
    chance = random.Random(0)
    refused = 0
    for number in range(2000):
        data = bytearray(short if number % 2 else original[-3000:])
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            read_pickle(bytes(data))
        except BrokenFile:
            refused += 1
    assert refused > 1000


def test_mutated_files_give_clean_errors(tmp_path):
    original = FILE.read_bytes()
    directory = original.rfind(b"PK\x01\x02vis_model_nested32"[:4], 0, len(original) - 40_000)
    chance = random.Random(1)
    path = tmp_path / "x.pth"
    for _ in range(30):
        data = bytearray(original)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(directory, len(data))] = chance.randrange(256)
        path.write_bytes(data)
        with contextlib.suppress(BrokenFile):  # anything else is a failure
            read_released(path)


def test_mutated_safetensors_headers_give_clean_errors(tmp_path):
    save_file({"conv_in.weight": torch.zeros(4, 3), "conv_in.bias": torch.zeros(4)}, tmp_path / "a")
    original = (tmp_path / "a").read_bytes()
    header = 8 + struct.unpack("<Q", original[:8])[0]
    chance = random.Random(2)
    path = tmp_path / "x.safetensors"
    for _ in range(2000):
        data = bytearray(original)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(header)] = chance.randrange(256)
        path.write_bytes(data)
        with pytest.raises(BrokenFile, match=f"^{re.escape(str(path))}"):
            read_released(path, CONFIG)


# --- converting --------------------------------------------------------------------------------


def test_a_converted_model_is_the_same_network(tmp_path):
    told = []
    convert(read_released(FILE), tmp_path, progress=lambda *numbers: told.append(numbers))
    model = Matryoshka.load(tmp_path)
    net, _ = load_released(FILE)
    for name, value in net.state_dict().items():
        assert torch.equal(value, model.net.state_dict()[name])
    assert told[-1][0] == told[-1][1] == sum(4 * p.numel() for p in net.parameters())
    assert model.config.data.pixels == "released"
    assert model.config.sampling.grid == "released"


def test_a_damaged_tensor_leaves_no_model_behind(tmp_path):
    flipped(tmp_path / "x.pth")
    with pytest.raises(BrokenFile, match="damaged"):
        convert(read_released(tmp_path / "x.pth"), tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))
    convert(read_released(FILE), tmp_path / "out")  # nothing is in the way of another try


# --- from the command line ---------------------------------------------------------------------


def mdm(*arguments) -> None:
    assert cli.main([str(word) for word in arguments]) == 0


def test_info_shows_the_network_and_the_run_configuration(capsys):
    mdm("info", FILE)
    shown = capsys.readouterr().out
    assert re.search(r"^2 +32x32 +32 32 +1 1 +0 0", shown, re.M)
    assert "text_model: google/flan-t5-xl" in shown


def test_a_released_file_is_sampled_from_at_once(tiny_t5, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    common = ("--text-encoder", tiny_t5, "--steps", "3", "--cfg", "2", "-n", "2")
    mdm("convert", FILE, "-o", tmp_path / "model", "--text-encoder", tiny_t5)
    mdm("info", tmp_path / "model")
    mdm("sample", FILE, "-p", "a blue jay", *common, "-o", tmp_path / "one")
    (kept,) = (tmp_path / "cache" / "released").glob("*/model.safetensors")
    written = kept.stat().st_mtime_ns
    mdm("sample", FILE, "-p", "a blue jay", *common, "-o", tmp_path / "two")
    assert kept.stat().st_mtime_ns == written, "it is converted once"
    mdm("sample", tmp_path / "model", "-p", "a blue jay", *common[2:], "-o", tmp_path / "three")
    pictures = [(tmp_path / n / "grid.png").read_bytes() for n in ("one", "two", "three")]
    assert len(set(pictures)) == 1
    for sampler, grid in (("dpmpp-2m", "log-snr"), ("ddim", "trailing")):
        extra = ("--sampler", sampler, "--grid", grid, "--negative", "red apple")
        out = ("-o", tmp_path / sampler)
        mdm("sample", tmp_path / "model", "-p", "a blue jay", *common[2:], *extra, *out)
    assert "Traceback" not in capsys.readouterr().err


def test_a_released_checkpoint_is_tuned_on_pictures_of_ones_own(tiny_t5, tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    for number in range(4):
        save_png(np.full((40, 40, 3), 60 * number, np.uint8), tmp_path / f"d/{number}.png", None)
        (tmp_path / f"d/{number}.txt").write_text("a blue jay")
    changes = (
        f"encoder.path={tiny_t5}",
        "train.stages[0].images=4",
        "train.stages[0].batch_size=2",
        "sampling.steps=1",
    )
    settings = [word for change in changes for word in ("--set", change)]
    mdm("train", FILE, "--data", tmp_path / "d", "--out", tmp_path / "run", *settings)
    net, _ = load_released(FILE)
    tuned = Matryoshka.load(tmp_path / "run").net.state_dict()
    changes = [(tuned[name] - value).norm() for name, value in net.state_dict().items()]
    assert sum(changes) > 0
    assert max(changes) < 1, "it started from the released weights"


def test_a_released_file_goes_to_diffusers(tiny_t5, tmp_path, monkeypatch):
    from matryoshka_diffusion.models.diffusers import MDMPipeline

    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    mdm("export", FILE, "--format", "diffusers", "-o", out, "--text-encoder", tiny_t5)
    pipe = MDMPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    model = Matryoshka.load(FILE, text_encoder=str(tiny_t5))
    native = model.sample(["a blue jay", "red"], seed=3, steps=2, guidance=2.0)
    images, _ = pipe(
        ["a blue jay", "red"],
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(3),
        return_dict=False,
    )
    for picture, expected in zip(images, native.pictures, strict=True):
        assert (np.array(picture) == expected).all()


def test_a_model_folder_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for command in ("convert", "export"):
        assert cli.main([command, str(FILE), "-o", str(tmp_path)]) == 2
        assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_encoder_of_another_width_is_refused(tmp_path, tiny_t5, monkeypatch, capsys):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    assert cli.main(["sample", str(FILE), "-p", "a", "--text-encoder", str(tmp_path)]) == 1
    assert "encoder.path takes a folder" in capsys.readouterr().err
    wide = tmp_path / "wide"
    shutil.copytree(tiny_t5, wide)
    config = transformers.T5Config(vocab_size=11, d_model=32, d_kv=4, d_ff=32, num_layers=1)
    transformers.T5EncoderModel(config).save_pretrained(wide)
    assert cli.main(["sample", str(FILE), "-p", "a", "--text-encoder", str(wide)]) != 0
    assert "32" in capsys.readouterr().err
