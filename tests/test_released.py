"""Released checkpoints: read as data, checked whole, converted a tensor at a time."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import pickletools
import random
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError
from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.files import BrokenFile
from matryoshka_diffusion.models.released import convert, load_released, read_released
from matryoshka_diffusion.models.released_pickle import Record, plain, read_pickle
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset

FILE = Path(__file__).parent / "data" / "reference" / "vis_model_nested32.pth"
CONFIG = json.loads(FILE.with_name("nested32.json").read_text())


class Evil:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


class EvilCode(Evil):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.canary)!r})",)


class EvilState(Evil):
    """An object whose state runs code if its class is imported and set."""

    def __reduce__(self):
        return EvilState, (self.canary,), {"canary": self.canary}

    def __setstate__(self, state):
        os.mkdir(state["canary"])


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


class Zeros:
    """A text encoder of one token each."""

    key, width = "zeros", 24

    def __call__(self, captions):
        return [torch.zeros(1, 24) for _ in captions]


def mdm(*arguments) -> int:
    return cli.main([str(word) for word in arguments])


# --- a file that fits ----------------------------------------------------------------------------


def test_every_way_to_give_the_weights_loads_the_same_network(tmp_path):
    mine = tensors()
    save_file(mine, tmp_path / "weights.safetensors")
    torch.save(mine, tmp_path / "bare.pth")
    torch.save(mine, tmp_path / "newer.pth", pickle_protocol=4)
    first, process = load_released(FILE)
    others = ("weights.safetensors", "bare.pth", "newer.pth")
    for weights in (mine, *(tmp_path / name for name in others)):
        net, other = load_released(weights, CONFIG)
        assert net.config == first.config
        assert other.prediction == process.prediction == "v"
        for name, value in net.state_dict().items():
            assert torch.equal(value, first.state_dict()[name])
    assert first.training is False
    with torch.no_grad():
        for parameter in load_released(mine, CONFIG)[0].parameters():
            parameter.zero_()
    assert any(value.any() for value in mine.values()), "loaded weights are a copy"
    z = tuple(torch.zeros(2, 3, side, side) for side in (16, 32))
    cond = Conditioning(
        tokens=torch.zeros(2, 4, 24),
        mask=torch.ones(2, 4, dtype=torch.bool),
        micro={"scale": torch.full((2,), 32.0)},
    )
    shapes = [y.shape for y in first(z, torch.full((2,), 0.5), cond)]
    assert shapes == [(2, 3, 16, 16), (2, 3, 32, 32)]


@pytest.mark.parametrize("side", [64, 256, 1024])
def test_the_three_released_models_are_recognised_by_their_keys(side):
    shapes = json.loads((FILE.parent / f"cc12m_{side}x{side}.keys.json").read_text())
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert read_released(weights).config == preset(f"released-{side}")
    key = next(key for key in shapes if key.endswith("lm_proj.weight"))
    weights[key] = torch.empty(shapes[key][0], 512, device="meta")
    with pytest.raises(BrokenFile, match="project"):
        read_released(weights)
    text = read_released(weights, text_dim=512).config.model.text
    assert text is not None
    assert text.features == 512


@pytest.mark.parametrize("form", [".pth", ".safetensors", ""])
@pytest.mark.parametrize(
    ("prefix", "dtype"),
    [("module.", torch.float16), ("_orig_mod.", torch.bfloat16), ("module._orig_mod.", None)],
)
def test_weights_of_wrapped_networks_and_of_other_floats_are_read(prefix, dtype, form, tmp_path):
    state = {
        f"{prefix}{name}": value.to(dtype or torch.float64) for name, value in tensors().items()
    }
    path = tmp_path / f"x{form}"
    if form == ".safetensors":
        save_file(state, path)
    elif form:
        torch.save(state, path)
    expected = load_released(FILE)[0].state_dict()
    net = load_released(path if form else state, CONFIG)[0]
    for name, value in net.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name].to(dtype or torch.float64).float())


@pytest.mark.parametrize(
    ("outer", "inner", "resolutions", "micro"),
    [
        (None, None, [32, 16], [{}, {}]),
        (None, "scale:16", None, [{"scale": (16.0, None)}, {}]),
        (
            "scale:8,watermark_score:0.1",
            "scale:16",
            [32, 16],
            [{"scale": (16.0, None)}, {"scale": (8.0, None), "watermark_score": (None, 0.1)}],
        ),
    ],
)
def test_networks_have_any_number_of_micro_conditions(outer, inner, resolutions, micro):
    unet = {**CONFIG["unet_config"], "micro_conditioning": outer}
    unet["inner_config"] = {**unet["inner_config"], "micro_conditioning": inner}
    state = tensors()
    for level, conditions in zip(("inner_unet.", ""), micro, strict=True):
        if "scale" not in conditions:
            for name in [name for name in state if name.startswith(f"{level}cond_layers.scale")]:
                del state[name]
        for name in [name for name in state if name.startswith(f"{level}cond_layers.scale")]:
            if "watermark_score" in conditions:
                state[name.replace("scale", "watermark_score")] = 2 * state[name]
    settings = {"unet_config": unet, **({"resolutions": resolutions} if resolutions else {})}
    run = read_released(state, settings).config
    assert [level.side for level in run.model.levels] == [16, 32]
    assert micro == [
        {one.name: (one.ceiling, one.usual) for one in level.micro} for level in run.model.levels
    ]
    net, _ = load_released(state, settings)
    assert net.config == run.model
    _, cond = Matryoshka(net, run, encoder=Zeros()).condition("a", None, 1)
    values = {"scale": 32.0, "watermark_score": 0.1}
    expected = {name: values[name] for level in micro for name in level}
    assert {name: value.item() for name, value in cond.micro.items()} == pytest.approx(expected)
    with pytest.raises(ConfigError, match="resolutions is missing"):
        read_released(state, {"unet_config": unet["inner_config"] | {"micro_conditioning": None}})


SQUARED = ("squared-cosine", "v", "eps", "clip", 1.0)


@pytest.mark.parametrize(
    ("change", "place", "expected"),
    [
        ({"schedule_type": "COSINE"}, 0, "truncated-cosine"),
        ({"schedule_type": 2}, 0, "linear-beta"),
        ({"prediction_type": "DDPM"}, 1, "eps"),
        ({"loss_target_type": "V_PREDICTION"}, 2, "v"),
        ({"threshold_function": 2}, 3, "dynamic"),
        ({"schedule_shifted_power": 2}, 4, 2.0),
        ({"schedule_shifted": False}, 4, 0.0),
    ],
)
def test_the_process_follows_the_run_configuration(change, place, expected):
    diffusion = {"sampler_config": change, "multi_res_weights": "4:1"}
    run = read_released(FILE, {**CONFIG, "diffusion_config": diffusion}).config
    assert run.process.level_weights == (1.0, 4.0), "coarse to fine"
    assert (*SQUARED[:place], expected, *SQUARED[place + 1 :]) == (
        run.model.schedule,
        run.process.prediction,
        run.process.weighting[0].name,
        run.sampling.threshold[0],
        run.model.levels[-1].shift_power,
    )


# --- a file or a configuration that does not fit -------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"resolutions": [32, 0]}, "no run configuration"),
        ({"unet_config": {"temporal_mode": True}}, "temporal_mode is True"),
        ({"unet_config": {"micro_conditioning": "scale:9999999999999"}}, "micro_conditioning"),
        ({"unet_config": {"micro_conditioning": "scale:8,scale:16"}}, "micro_conditioning"),
        ({"unet_config": {"micro_conditioning": "score:nan"}}, "micro_conditioning"),
        ({"unet_config": {"temporal_dim": 10**30}}, "unet_config holds a number"),
        ({"unet_config": {"resolution_channels": [33, 32]}}, "multiple of"),
        ({"unet_config": {"resnet_config": {"num_groups_norm": 16}}}, "num_groups_norm is 16"),
        ({"unet_config": {"num_attention_layers": [0, 1]}}, "masked_cross_attention differs"),
        ({"unet_config": {"inner_config": {"num_lm_head_layers": 60_000}}}, r"60,0\d\d layers"),
        ({"diffusion_config": {"sampler_config": {"num_diffusion_steps": 0}}}, "steps is 0"),
        ({"diffusion_config": {"sampler_config": {"schedule_type": "x" * 10**6}}}, "KeyError"),
    ],
)
def test_a_configuration_that_no_released_model_has_is_one_short_error(change, key):
    unet = {**CONFIG["unet_config"], **change.get("unet_config", {})}
    if "inner_config" in change.get("unet_config", {}):
        unet["inner_config"] = {**CONFIG["unet_config"]["inner_config"], **unet["inner_config"]}
    with pytest.raises(ValueError, match=key) as caught:
        load_released(FILE, {**CONFIG, **change, "unet_config": unet})
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "key"),
    [
        (lambda s: s.pop("conv_in.bias"), "levels.1.stem.bias is missing"),
        (lambda s: s.update(surprise=torch.zeros(3)), "surprise"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(33)}), r"is \(33,\)"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(32, dtype=torch.int32)}), "IntStorage"),
        (lambda s: s.update({"module.conv_in.bias": torch.zeros(32)}), "several keys"),
        (lambda s: s.update({"conv_in.bias": 3}), "conv_in.bias"),
        (lambda s: s.clear(), "no state_dict"),
        (lambda s: s.update(dict.fromkeys(map(str, range(30)), torch.zeros(90_000))), "more than"),
    ],
)
def test_a_checkpoint_fits_or_is_refused(damage, key, tmp_path):
    state = tensors()
    damage(state)
    path = saved(tmp_path / "x.pth", state_dict=state)
    with pytest.raises(BrokenFile, match=key) as caught:
        load_released(path, CONFIG)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def other_zip(path):
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


def torchscript(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: p.write_bytes(FILE.read_bytes()[:-1000]), "cut short"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "no checkpoint"),
        (other_zip, "0 data.pkl"),
        (torchscript, "no state_dict"),
        (packed, "packed"),
        (flipped, "damaged"),
        (lambda p: rewritten(p, lambda data: data[:5000]), "pickle is damaged"),
        (lambda p: rewritten(p, lambda _: pickle.dumps([1])), "no state_dict"),
        (lambda p: rewritten(p, lambda _: b"\x80\x02r\xff\xff\xff\x7f."), "pickle is damaged"),
        (lambda p: rewritten(p, lambda _: b"\x80\x02" + b"]" * 400_001), "steps"),
        (lambda p: rewritten(p, lambda _: b"0" * (2**24 + 1)), "too large"),
    ],
)
def test_a_file_that_is_something_else_is_one_clear_error(make, key, tmp_path):
    path = tmp_path / "x.pth"
    make(path)
    with pytest.raises(BrokenFile, match=key) as caught:
        load_released(path)
    assert str(caught.value).startswith(str(path))


def test_broken_safetensors_headers_are_clean_errors(tmp_path):
    """Six made by hand, and five hundred mutations of a sound one."""
    save_file({"conv_in.weight": torch.zeros(4, 3), "conv_in.bias": torch.zeros(4)}, tmp_path / "a")
    original = (tmp_path / "a").read_bytes()
    long = b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,39999996]}}   '
    cases = [b"", b"1234", struct.pack("<Q", 70) + long]
    cases += [struct.pack("<Q", size) + b"{}" for size in (2**63, 10**9, 2)]
    chance, header = random.Random(2), 8 + struct.unpack("<Q", original[:8])[0]
    for _ in range(500):
        data = bytearray(original)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(header)] = chance.randrange(256)
        cases.append(bytes(data))
    path = tmp_path / "x.safetensors"
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(BrokenFile, match=f"^{re.escape(str(path))}"):
            read_released(path, CONFIG)


# --- nothing is run, and little is taken ---------------------------------------------------------


@pytest.mark.parametrize("evil", [Evil, EvilCode, EvilState])
@pytest.mark.parametrize("place", ["args", "deep", "state_dict", "top"])
def test_nothing_that_a_file_names_is_called(evil, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    canary, state, path = tmp_path / "canary", tensors(), tmp_path / "x.pth"
    content = {
        "args": {"state_dict": state, "args": evil(canary)},
        "deep": {"state_dict": state, "args": {**CONFIG, "x": [evil(canary)]}},
        "state_dict": {"state_dict": {**state, "extra": evil(canary)}},
        "top": evil(canary),
    }[place]
    torch.save(content, path)
    fits = place == "deep"  # the others have no run configuration, or no state
    for arguments in (
        ["info", path],
        ["convert", path, "-o", tmp_path / "out"],
        ["export", path, "-o", tmp_path / "out2"],
    ):
        assert mdm(*arguments) == (0 if fits else 1), arguments
        assert not canary.exists()
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    if evil is not EvilState:
        assert (str(canary) in output.out) == fits, "info shows what the file asks for"
    torch.load(path, weights_only=False)
    assert canary.is_dir(), "the canary can sing"


def test_random_programs_call_nothing_and_fail_cleanly(monkeypatch):
    """Pickles of random instructions, most of them such as `torch.save` writes."""
    calls = []
    monkeypatch.setattr(os, "system", lambda *a: calls.append(a))
    chance = random.Random(3)
    names = [b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n"]
    names += [b"cbuiltins\ngetattr\n", b"ctorch._utils\n_rebuild_tensor_v2\n"]
    uses = [b")R", b"(K\x01K\x02tR", b"(X\x01\x00\x00\x00atR", b"}b", b")\x81", b"Q", b"(lb"]
    plain_ops = [op for op in pickletools.opcodes if op.arg is None and op.name != "STOP"]
    finished = 0
    for _ in range(3000):
        program = b"\x80\x02"
        for _ in range(chance.randint(1, 30)):
            kind = chance.random()
            if kind < 0.4:
                program += chance.choice(names) + chance.choice(uses)
            elif kind < 0.6:
                program += chance.choice((b"h", b"q", b"K")) + bytes([chance.randrange(6)])
            else:
                program += chance.choice(plain_ops).code.encode("latin1")
        with contextlib.suppress(BrokenFile):
            plain(read_pickle(program + b"."), calls=True)
            finished += 1
    assert not calls
    assert finished > 20


def test_mutated_files_give_clean_errors(tmp_path):
    """Mutations of the pickle, and of the zip's directory; each is read as data or refused."""
    with zipfile.ZipFile(FILE) as archive:
        original = archive.read("vis_model_nested32/data.pkl")
    short, chance, refused = original[:2000] + original[-3000:], random.Random(0), 0
    for number in range(800):
        data = bytearray(short if number % 2 else original[-3000:])
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            read_pickle(bytes(data))
        except BrokenFile:
            refused += 1
    assert refused > 400
    whole, path = FILE.read_bytes(), tmp_path / "x.pth"
    directory = whole.rfind(b"PK\x01\x02", 0, len(whole) - 40_000)
    for _ in range(10):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(directory, len(data))] = chance.randrange(256)
        path.write_bytes(data)
        with contextlib.suppress(BrokenFile):  # anything else is a failure
            read_released(path)


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
    knot = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60
    yield start + knot + b"}h\x00K\x01s" + end
    yield start + knot + b"\x85\x91" + end
    yield start + b"".join(b"c%d\ny\n" % n for n in range(200_000)) + end


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


def test_records_are_data_and_too_many_values_are_refused():
    record = read_pickle(pickle.dumps({"x": Evil(Path("here")), "y": Path("a/b")}, protocol=2))
    assert isinstance(record["x"], Record)
    assert record["x"].name.endswith(".mkdir")
    assert (record["x"].args, record["y"].args) == (("here",), ("a", "b"))
    assert not Path("here").exists()
    bomb: list = []
    for _ in range(40):
        bomb = [bomb, bomb]
    with pytest.raises(BrokenFile, match="too large"):
        plain(read_pickle(pickle.dumps(bomb)))


@pytest.mark.parametrize("protocol", [2, 4])
def test_numbers_of_numpy_are_numbers(protocol):
    told = {"loss": np.float64(0.019), "step": np.int64(-7), "scale": np.float32(0.5)}
    content = pickle.dumps(told, protocol)
    for calls in (True, False):
        assert plain(read_pickle(content), calls=calls) == {"loss": 0.019, "step": -7, "scale": 0.5}


@pytest.mark.parametrize("args", [(), (1, 2), ("f8", b"x"), (Record("d", ("f8",)), b"short")])
def test_other_calls_of_that_name_stay_calls(args):
    assert "scalar" in plain(Record("numpy.core.multiarray.scalar", args), calls=True)


# --- converting, and the command line ------------------------------------------------------------


def test_a_conversion_is_the_same_network_or_leaves_nothing(tmp_path):
    flipped(tmp_path / "x.pth")
    with pytest.raises(BrokenFile, match="damaged"):
        convert(read_released(tmp_path / "x.pth"), tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))
    output = []
    released = read_released(FILE)
    convert(released, tmp_path / "out", progress=lambda *numbers: output.append(numbers))
    model, (net, _) = Matryoshka.load(tmp_path / "out"), load_released(FILE)
    for name, value in net.state_dict().items():
        assert torch.equal(value, model.net.state_dict()[name])
    assert output[-1][0] == output[-1][1] == sum(4 * p.numel() for p in net.parameters())
    assert (model.config.data.pixels, model.config.sampling.grid) == ("released", "released")


def test_a_released_file_is_sampled_from_at_once(tiny_t5, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    assert mdm("info", FILE) == 0
    output = capsys.readouterr().out
    assert re.search(r"^2 +32x32 +32 32 +1 1 +0 0", output, re.M)
    assert "text_model: google/flan-t5-xl" in output
    encoder, common = ("--text-encoder", tiny_t5), ("-p", "a jay", "--steps", "2", "--cfg", "2")
    assert mdm("convert", FILE, "-o", tmp_path / "model", *encoder) == 0
    assert mdm("sample", FILE, *encoder, *common, "-o", tmp_path / "one") == 0
    (cached,) = (tmp_path / "cache" / "released").glob("*/model.safetensors")
    written = cached.stat().st_mtime_ns
    assert mdm("sample", FILE, *encoder, *common, "-o", tmp_path / "two") == 0
    assert cached.stat().st_mtime_ns == written, "it is converted once"
    assert mdm("sample", tmp_path / "model", *common, "-o", tmp_path / "three") == 0
    pictures = [(tmp_path / n / "levels.png").read_bytes() for n in ("one", "two", "three")]
    assert len(set(pictures)) == 1
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine").write_text("mine")
    for command in ("convert", "export"):
        assert mdm(command, FILE, "-o", tmp_path / "notes") == 2
        assert "is not empty" in capsys.readouterr().err


def test_a_released_checkpoint_is_tuned_on_pictures_of_ones_own(tiny_t5, tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    for number in range(4):
        save_png(np.full((40, 40, 3), 60 * number, np.uint8), tmp_path / f"d/{number}.png", None)
        (tmp_path / f"d/{number}.txt").write_text("a blue jay")
    stage = ("train.stages[0].images=4", "train.stages[0].batch_size=2", "sampling.steps=1")
    settings = [w for change in (f"encoder.path={tiny_t5}", *stage) for w in ("--set", change)]
    assert mdm("train", FILE, "--data", tmp_path / "d", "--out", tmp_path / "run", *settings) == 0
    net, _ = load_released(FILE)
    tuned = Matryoshka.load(tmp_path / "run").net.state_dict()
    changes = [(tuned[name] - value).norm() for name, value in net.state_dict().items()]
    assert sum(changes) > 0
    assert max(changes) < 1, "it started from the released weights"


def test_an_encoder_of_another_width_and_a_missing_file_are_refused(tmp_path, tiny_t5, capsys):
    assert mdm("sample", FILE, "-p", "a", "--text-encoder", tmp_path) == 1
    assert "encoder.path" in capsys.readouterr().err
    wide = shutil.copytree(tiny_t5, tmp_path / "wide")
    config = transformers.T5Config(vocab_size=11, d_model=32, d_kv=4, d_ff=32, num_layers=1)
    transformers.T5EncoderModel(config).save_pretrained(wide)
    assert mdm("sample", FILE, "-p", "a", "--text-encoder", wide) != 0
    assert "32" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_released("nowhere.pth")
