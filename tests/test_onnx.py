"""Models as ONNX graphs draw with numpy what the library draws, within one grey value."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import ConfigError, UsageError
from matryoshka_diffusion.models import onnx_sampler
from matryoshka_diffusion.models.onnx import export_onnx
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import Resolution, up_sample
from matryoshka_diffusion.samplers import SeededNoise
from test_pipeline import class_model, moving, plain_model, text_model

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
SEEDS = [3, 2**40, 7]


def apart(model: Matryoshka, folder: Any, *prompts: str, **settings: Any) -> int:
    """The largest difference in grey values between the folder's images and the library's."""
    kind = "classes" if model.model.classes else "prompts"
    conditions = {kind: list(prompts)} if prompts else {"n": len(SEEDS)}
    expected = model.sample(**conditions, seed=SEEDS, **settings).levels
    images = onnx_sampler.Model(folder).sample(prompts, SEEDS)
    assert [image.shape for image in images] == [level.shape for level in expected]
    assert all(np.ptp(image) > 30 for image in images), "an even image would show nothing"
    pairs = zip(images, expected, strict=True)
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)


def test_a_model_of_text_draws_the_same_with_guidance_and_late_levels(tmp_path):
    """Captions of several lengths, a threshold for each level, and a level that sleeps at first."""
    model, prompts = text_model(), ["a red dot", "green", "one of several blue dots"]
    settings: dict[str, Any] = {
        "steps": 6, "guidance": (2.0, 1.5), "wake": (-1.0,), "threshold": ("dynamic", "clip"),
    }  # fmt: skip
    export_onnx(model, tmp_path / "onnx", captions=prompts, **settings)
    assert {path.name for path in (tmp_path / "onnx").glob("*.onnx")} == {
        "levels-1.onnx",
        "levels-2.onnx",
    }
    assert apart(model, tmp_path / "onnx", *prompts, **settings) <= 1


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_a_model_of_classes_draws_the_same_whatever_it_predicts(tmp_path, prediction):
    model = class_model()
    process = model.config.process.model_copy(update={"prediction": prediction})
    model = Matryoshka(model.net, model.config.model_copy(update={"process": process}))
    settings = {"steps": 5, "guidance": 3.0}
    export_onnx(model, tmp_path / "onnx", **settings)
    assert apart(model, tmp_path / "onnx", "eel", "cat", "dog", **settings) <= 1


def test_weights_of_half_precision_take_half_of_the_room(tmp_path):
    model = plain_model()
    for dtype in ("fp32", "fp16"):
        export_onnx(model, tmp_path / dtype, dtype=dtype, steps=4)
    whole, half = ((tmp_path / d / "weights.bin").stat().st_size for d in ("fp32", "fp16"))
    assert whole / 2 <= half < 0.55 * whole
    halved = {name: x.half().float() for name, x in model.net.state_dict().items()}
    assert apart(model, tmp_path / "fp32", steps=4) <= 1
    model.net.load_state_dict(halved)
    assert apart(model, tmp_path / "fp16", steps=4) <= 3  # small constants stay whole


def test_the_folder_draws_without_the_library(tmp_path):
    export_onnx(class_model(), tmp_path / "onnx", steps=2)
    moved = shutil.move(tmp_path / "onnx", tmp_path / "elsewhere")
    blocked = "import sys; sys.modules['torch'] = sys.modules['matryoshka_diffusion'] = None; "
    run = "sys.argv[1:] = ['-p', 'dog', '-o', sys.argv[2]]; import runpy; "
    code = blocked + f"path = sys.argv[1]; {run} runpy.run_path(path, run_name='__main__')"
    out = tmp_path / "dog.png"
    subprocess.run([sys.executable, "-c", code, f"{moved}/sample.py", str(out)], check=True)
    assert out.stat().st_size > 100


def test_noise_and_enlarging_are_those_of_the_library():
    shapes = [(3, 8, 8), (3, 16, 16), (1, 5, 3)]
    noise = SeededNoise(SEEDS, shapes).start()
    for level, shape in enumerate(shapes):
        own = np.stack([onnx_sampler.normal(seed, level, shape) for seed in SEEDS])
        assert np.abs(own - noise[level].numpy()).max() < 1e-5
    for side in (16, 24, 64):
        expected = up_sample(noise[0], Resolution(side, side)).numpy()
        assert np.abs(onnx_sampler.enlarged(noise[0].numpy(), side) - expected).max() < 1e-5


def test_what_a_folder_cannot_draw_is_refused(tmp_path):
    with pytest.raises(UsageError, match="clips"):
        export_onnx(moving(plain_model()), tmp_path / "onnx")
    with pytest.raises(UsageError, match="ddpm"):
        export_onnx(plain_model(), tmp_path / "onnx", sampler="ddpm")
    with pytest.raises(UsageError, match=r"sampling\.rescale"):
        export_onnx(class_model(), tmp_path / "onnx", guidance=2.0, rescale=0.5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        export_onnx(plain_model(), tmp_path)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dtype fp16", "--dtype fp16: mdm takes fp32, bf16"),
        ("--format onnx --dtype bf16", "--dtype bf16: onnx takes fp32, fp16"),
        ("--format diffusers --steps 4", "--steps is for --format onnx"),
        ("--cfg 2", "--cfg is for --format onnx"),
    ],
)
def test_an_option_of_another_format_is_refused(words, message, tmp_path, capsys):
    assert cli.main(["export", "openmoji", "-o", str(tmp_path / "out"), *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
