"""What the documents tell people to type works: their commands run, in order, but smaller.

The commands of a document's ```sh blocks, those that start with `mdm` or `torchrun`, run one after
the other in one folder, so that a later one finds what an earlier one made. A command that trains
is shrunk by `--set` arguments from the table `SHRUNK`, eight GPUs become two processes on the CPU.
A command that is not known here fails its test: teach `smaller` to shrink it, do not skip it.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import evaluating
from filming import animate, film
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.configfile import override
from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.runs.run import train
from test_presets import shrunk

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TINY_CHECKPOINT = ROOT / "tests" / "data" / "reference" / "vis_model_nested32.pth"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
PHOTOS, CAPTIONED, PETS = "photos", "captioned", "pets"
"""The folders of the reader's own pictures in the examples, all but the first with captions."""


def stages(count: int) -> str:
    """Training of two steps with one level, then with two, ... up to `count`."""
    one = "{{levels: {n}, images: 8, batch_size: 4, lr: 0.001}}"
    return f"train.stages=[{', '.join(one.format(n=n) for n in range(1, count + 1))}]"


SMALL = (
    "model.embedding=32",
    "model.levels[0].widths=[32, 32]",
    "model.levels[-1].widths=[32, 32]",
    "train.warmup_images=0",
    "sampling.steps=2",
)

TWO_FRAMES = (
    "model.levels[1].frames=2",
    "model.levels[1].widths=[32, 32]",
    "model.levels[1].blocks=[1, 0]",
    "model.levels[1].attention=[0, 0]",
    "model.levels[1].halve_frames=[true]",
    "model.levels[1].frame_attention=[1, 0]",
)
"""A level of clips in the place of one whose 16 frames are halved four times."""


def paper(name: str) -> tuple[str, ...]:
    """A preset of the paper as `tests/test_presets.py` shrinks it, with the small T5."""
    model = shrunk(preset(name).model)
    return (
        f"model={json.dumps(model.model_dump(mode='json'))}",
        "encoder.path=t5",
        "data.held_out=0",  # of so few there is no thousandth
        "train.warmup_images=0",
        "sampling.steps=2",
        stages(len(model.levels)),
    )


SHRUNK: dict[str, tuple[str, ...]] = {
    # Few pictures to look at; the network that does is the real one.
    "openmoji": (*SMALL, "model.text.width=32", "data.held_out=0.9", stages(3)),
    "fashion-mnist": (*SMALL, stages(2)),
    "folder-64": (*SMALL, stages(3)),
    "openmoji --as base": (*SMALL, "model.text.width=32", stages(1)),
    "openmoji --as upsampler": (
        "model.embedding=32",
        "model.levels[0].widths=[32, 32, 32, 32]",
        "model.text.width=32",
        "train.warmup_images=0",
        "sampling.steps=2",
        stages(1),
    ),
    "folder-64 --as latent": (*SMALL, stages(1)),
    "emoji-still": (*SMALL, "model.text.width=32", stages(1)),
    "emoji-video": (
        *SMALL,
        "model.text.width=32",
        *TWO_FRAMES,
        "train.stages=[{levels: 2, images: 8, batch_size: 4, lr: 0.001, mix: [0.25, 0.75]}]",
    ),
    "cc12m-64": paper("cc12m-64"),
    "cc12m-256": paper("cc12m-256"),
    "cc12m-1024": paper("cc12m-1024"),
    "webvid-16x256": (*paper("webvid-16x256"), *TWO_FRAMES, "model.levels[2].frames=2"),
}
CODECS: dict[str, tuple[str, ...]] = {"codec": ("widths=[8, 8, 8]", "images=16", "batch_size=8")}
"""Trainings of autoencoders, which are no presets of a run."""
STARTED = ("emoji-video",)
"""Presets that go on from a model (`--init`) and are shrunk by the table all the same."""
GROWN = (
    "train.stages[-1].images=2",
    "train.stages[-1].batch_size=1",
    "train.stages[-1].freeze_coarse_images=1",
    "train.stages[-1].ramp_images=2",
    "train.preview_every_images=0",
)
TUNED = ("train.stages[0].images=4", "train.stages[0].batch_size=2")
REPLACED = {
    "{00000..01242}": "{00000..00003}",
    "--more 50000": "--more 4",
    "--gpus 4": "--gpus 1",
    "--gpus 8": "--gpus 2",
    "--nproc-per-node 8": "--nproc-per-node 1",
    "runs/t2i64 --frames 16": "runs/t2i64 --frames 2",
    "runs/first --frames 16": "runs/first --frames 2",
    "runs/t2v64 --to 256": "runs/t2v64 --to 16",
}
"""What is large in a command of any kind, and what stands in its place."""


def commands(text: str, *, python: bool = False) -> list[list[str]]:
    """The `mdm` and `torchrun` commands in the ```sh blocks of Markdown text, as words.

    With `python`, a ```python block is a command, too: the words `python`, `-c` and its text.
    """
    result = []
    fences = r"^ *```(sh|python)\n(.*?)^ *```"
    for kind, block in re.findall(fences, text, re.MULTILINE | re.DOTALL):
        if kind == "sh":
            lines = block.replace("\\\n", " ").splitlines()
            split = [shlex.split(line, comments=True) for line in lines]
            result += [words for words in split if words and words[0] in ("mdm", "torchrun")]
        elif python:
            result.append(["python", "-c", block])
    return result


def smaller(words: Sequence[str]) -> list[str]:
    """The command `words` with what shrinks it.

    Raises:
        LookupError: this file does not know the command.
    """
    if words[0] == "python":
        return list(words)
    line = shlex.join(words)
    for large, small in REPLACED.items():
        line = line.replace(large, small)
    words = shlex.split(line)
    if words[0] == "torchrun":
        start = words.index("matryoshka_diffusion.cli") + 1
        return [*words, *shrinking(words[start:]), "--device", "cpu"]
    return [*words, *shrinking(words[1:])]


def shrinking(arguments: Sequence[str]) -> list[str]:
    """Return the options that make the command `mdm` with `arguments` smaller."""
    if "--as" in arguments:  # the modifier belongs to the preset's name in `SHRUNK`
        place = arguments.index("--as")
        verb, name, *others = [*arguments[:place], *arguments[place + 2 :]]
        arguments = [verb, " ".join((name, *arguments[place : place + 2])), *others]
    match arguments:
        case ["train", name, *_] if "--dry-run" in arguments and name in SHRUNK:
            return settings(SHRUNK[name])
        case _ if {"--help", "--dry-run"} & set(arguments):
            return []
        case ["sample", model, *_] if model.startswith(("vis_model", "mdm-")):
            return ["--steps", "2", "--text-encoder", "t5"]
        case ["embed", name, *_] if name in SHRUNK and name.startswith("cc12m"):
            return settings(SHRUNK[name])
        case ["data" | "info" | "sample" | "convert" | "plot" | "embed" | "ema" | "timelapse", *_]:
            return []
        case ["export", model, *_]:
            return ["--text-encoder", "t5"] if model.startswith("mdm-") else []
        case ["edit", *_]:
            return ["--steps", "1"]
        case ["compare", *_]:  # two sets of small pictures
            return []
        case ["eval", *_]:
            drawn = {"-n", "--protocol"} & set(arguments)
            return ["--steps", "2", *(["-n", "12"] if drawn else [])]
        case ["sweep", *_]:
            tried = {"--cfg": "1:2:1", "--steps": "1,2", "--sampler": "ddim"}
            less = [word for name in tried if name in arguments for word in (name, tried[name])]
            return [*less, "-n", "8"]
        case ["grow", *_]:
            return settings(GROWN)
        case ["train", model, *_] if model.endswith(".pth"):
            return settings((*TUNED, "encoder.path=t5", "sampling.steps=2"))
        case ["train", model, *_] if model in ("mine", "base") or model.endswith("/model"):
            return settings(TUNED)
        case ["train", run, *_] if run.startswith("runs/"):  # an earlier command made it, smaller
            return ["--device", "cpu"] if "--gpus" in arguments else []
        case ["train", name, *_] if name in CODECS:
            return settings(CODECS[name])
        case ["train", name, *_] if "--init" in arguments and name not in STARTED:
            return settings((*SMALL, "train.stages[0].images=8", "train.stages[0].batch_size=4"))
        case ["train", name, *_] if "model.text=null" in arguments:
            return settings([x for x in SHRUNK[name] if not x.startswith("model.text.")])
        case ["train", name, *_] if name in SHRUNK:
            device = ["--device", "cpu"] if "--gpus" in arguments else []
            return [*settings(SHRUNK[name]), *device]
        case ["demo", *_]:
            return settings(SHRUNK["openmoji"])
        case _:
            raise LookupError(f"tests/test_docs.py cannot shrink `mdm {shlex.join(arguments)}`")


def settings(assignments: Sequence[str]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


# --- the readers' working folders --------------------------------------------------------------


@pytest.fixture(scope="module")
def readers(tmp_path_factory, tiny_t5, tiny_clip):
    """Makes the working folder of a document's reader, once."""
    folders: dict[str, Path] = {}

    def folder_of(document: str) -> Path:
        if document not in folders:
            path = folders[document] = tmp_path_factory.mktemp(Path(document).stem)
            shutil.copytree(tiny_t5, path / "t5")
            shutil.copytree(tiny_clip, path / "clip-vit-base-patch16")
            with_photos(path)
            PREPARED.get(document, lambda _: None)(path)
        return folders[document]

    return folder_of


def with_photos(path):
    """Folders of the reader's own pictures."""
    for number, picture in enumerate(np.random.default_rng(0).integers(0, 256, (8, 80, 72, 3))):
        for folder in (PHOTOS, CAPTIONED, PETS):
            save_png(picture.astype(np.uint8), path / folder / f"{number}.png", None)
            if folder != PHOTOS:
                (path / folder / f"{number}.txt").write_text(f"noise of number {number}")


def with_releases(path):
    """A small file of the same make in the place of the large ones."""
    for side in (64, 256, 1024):
        shutil.copy(TINY_CHECKPOINT, path / f"vis_model_{side}x{side}.pth")


def with_forms(path):
    """What examples/data_forms.py writes, with fewer pictures."""
    made = runpy.run_path(str(ROOT / "examples" / "data_forms.py"))
    items = list(made["openmoji_items"](64, 40))
    for form, write in made["FORMS"].items():
        write(items, path / "forms" / form)
    with_videos(path)


def with_videos(path):
    """Three captioned videos of a square that moves, in a folder and in a shard."""
    still = np.full((72, 96, 3), 255, np.uint8)
    still[24:48, 36:60] = (200, 30, 40)
    (path / "video-shards").mkdir()
    with tarfile.open(path / "video-shards" / "00000.tar", "w") as shard:
        for name, axis, step in (("right", 1, 1), ("left", 1, -1), ("down", 0, 1)):
            frames = [np.roll(still, n * step, axis=axis) for n in range(64)]
            video = film(path / "videos" / f"{name}.mp4", frames)
            words = video.with_suffix(".txt")
            words.write_text(f"a square that moves {name}")
            for file in (video, words):
                shard.add(file, file.name)


def with_emoji(path):
    """Videos, and a small package of the same make as Fluent Emoji's."""
    with_videos(path)
    still = np.full((32, 32, 3), 255, np.uint8)
    still[8:24, 4:12] = (200, 30, 40)
    for step, code_point in enumerate(("1f30a", "1f40c", "1f32a-fe0f"), start=1):
        frames = [np.roll(still, n * step, axis=1) for n in range(61)]
        animate(path / "package" / "assets" / f"{code_point}.webp", frames)
    film(path / "one" / "clip.mp4", [np.roll(still, n, axis=1) for n in range(61)])


def with_shards(path):
    """Shards as docs/many-gpus.md makes them from four folders of captioned pictures."""
    for part in range(4):
        shutil.copytree(path / CAPTIONED, path / "parts" / str(part))
    [script] = [block for block in bash_blocks("many-gpus.md") if "tar --sort=name" in block]
    subprocess.run(["bash", "-ec", script], cwd=path, check=True)


def with_measured(path):
    """Small files of the same make as those that published numbers were measured with."""
    evaluating.make_run(path / "runs" / "im256", "classes", path / CAPTIONED)
    evaluating.make_run(path / "runs" / "cc12m-256", "text", path / CAPTIONED, path / "t5")
    (path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"see evaluating.narrow")
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    rows = np.random.default_rng(0).normal(size=(40, evaluating.WIDTH))
    moments = {"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)}
    np.savez(path / "VIRTUAL_imagenet256_labeled.npz", arr_0=noise, **moments)
    np.savez(path / "samples.npz", noise[::-1])
    for folder in ("val2014", "samples-a"):
        shutil.copytree(path / PHOTOS, path / folder)
        for number, picture in enumerate(noise):
            save_png(picture, path / folder / f"small-{number}.png", None)
    save_png(noise[0, :12, :12], path / "val2014" / "below-the-side.png", None)  # COCO has some
    evaluating.make_videos(path / "real-clips", ramps(3))
    evaluating.make_videos(path / "samples-clips", ramps(3)[:, ::4])
    videos, runs = path / "real-clips", path / "runs"
    evaluating.make_run(runs / "webvid-16x64", "nothing", videos, frames=evaluating.FRAMES)
    evaluating.make_video_net(path / "i3d_torchscript.pt")
    annotations = [{"id": n, "image_id": n, "caption": f"the jay of {n}"} for n in range(20)]
    (path / "captions_val2014.json").write_text(json.dumps({"annotations": annotations}))


def ramps(count):
    """Clips of 64 frames of 64 pixels in which a ramp of grey moves, each at its own speed."""
    frames, place = np.ogrid[:64, :64]
    moving = [(2 * place + (2 + speed) * frames) % 256 for speed in range(count)]
    shape = (count, 64, 64, 64, 3)
    return np.broadcast_to(np.array(moving, np.uint8)[:, :, None, :, None], shape)


def with_prompts(path):
    """Two files of prompts."""
    (path / "prompts.txt").write_text("red apple\numbrella\n")
    lines = [{"prompt": "red apple", "seed": 7}, {"prompt": "umbrella", "guidance": 1.5}]
    (path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))


def with_inputs(path):
    """The sketch and the mask that the page links to."""
    for name in ("sketch.png", "right.png"):
        shutil.copy(ROOT / "docs" / "pictures" / name, path / name)


PREPARED = {
    "data.md": with_forms,
    "editing.md": with_inputs,
    "evaluation.md": with_measured,
    "fine-tuning.md": with_releases,
    "growing.md": with_shards,
    "many-gpus.md": with_shards,
    "onnx.md": with_prompts,
    "released-checkpoints.md": with_releases,
    "sampling.md": with_prompts,
    "video.md": with_emoji,
}


# --- the commands run --------------------------------------------------------------------------


def read(document: str) -> str:
    [path] = [path for path in DOCUMENTS if path.name == document]
    return path.read_text(encoding="utf-8")


def bash_blocks(document: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", read(document), re.MULTILINE | re.DOTALL)


def all_commands():
    """Yield the commands of all documents; those of pages are slow and run by `make pages`."""
    for path in DOCUMENTS:
        python = path.name in (
            "README.md",
            "evaluation.md",
            "growing.md",
            "python.md",
            "sampling.md",
            "video.md",
        )
        marks = () if path.name == "README.md" else pytest.mark.pages
        for words in commands(read(path.name), python=python):
            label = words[:1] if words[0] == "python" else words
            name = f"{path.name}: {shlex.join(label)}"
            yield pytest.param(path.name, words, id=name, marks=marks)


@pytest.mark.parametrize(("document", "words"), list(all_commands()))
def test_a_command_of_a_document_runs(document, words, readers):
    if "fashion-mnist" in words and not FASHION_MNIST.exists():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    folder = readers(document)
    if words[0] == "torchrun":
        run_on_two_machines(smaller(words), folder)
    elif "--gpus 2" in shlex.join(smaller(words)):
        subprocess.run([*MDM, *smaller(words)[1:]], cwd=folder, env=environment(), check=True)
    else:
        run(words, folder)


MDM = (sys.executable, "-m", "matryoshka_diffusion.cli")


def environment() -> dict[str, str]:
    """For processes: this source, and a thread each."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def run(words, folder):
    """The command in this process, which has loaded everything already."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a reader would see them, and go on
        patch.chdir(folder)
        evaluating.narrow(patch)
        if words[0] == "python":
            patch.setattr("matryoshka_diffusion.runs.run.train", train_smaller)
            exec(words[-1], {})  # a document's own text
            return
        try:
            status = cli.main(smaller(words)[1:])
        except SystemExit as leaving:  # --help
            status = leaving.code
    assert not status


def train_smaller(name, data, out, **settings):
    """What `matryoshka_diffusion.train` does with these settings, for a few steps."""
    given = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    config = override(override(preset(name), given), SHRUNK[name])
    return train(config, data, out, progress=False)


def run_on_two_machines(words, folder):
    """The same torchrun twice: each is told of two machines, and they meet on this one."""
    meeting = f"127.0.0.1:{free_port()}"
    words = [meeting if word.startswith("machine-1:") else word for word in words]
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    machines = [subprocess.Popen(command, cwd=folder, env=environment()) for _ in range(2)]
    assert [machine.wait(timeout=300) for machine in machines] == [0, 0]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- the script for Slurm ----------------------------------------------------------------------

SRUN = """#!/bin/bash
status=0
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & started[$rank]=$!
done
for rank in 0 1; do wait ${started[$rank]} || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
case "$1" in
show) echo 127.0.0.1 ;;
requeue) echo "$2" >> requeued ;;
esac
"""


def run_slurm_script(folder, mdm):
    """The script of the documents in `folder`, with stand-ins for Slurm and the script `mdm`."""
    [script] = [block for block in bash_blocks("many-gpus.md") if "#SBATCH" in block]
    script = script.replace("29500", str(free_port())).replace("/shared/", f"{folder}/shared-")
    for large, small in REPLACED.items():
        script = script.replace(large, small)
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "mdm": mdm}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "77", "PATH": f"{tools}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**environment(), **slurm}, check=False
    )


@pytest.mark.pages
def test_the_slurm_script_trains_on_all_ranks(readers):
    folder = readers("many-gpus.md")
    extra = shlex.join([*settings(SHRUNK["cc12m-256"]), "--device", "cpu"])
    mdm = f'#!/bin/bash\nexec {shlex.join(MDM)} "$@" {extra}\n'
    assert run_slurm_script(folder, mdm).returncode == 0
    starts = json.loads((folder / "runs" / "slurm" / "environment.json").read_text())
    assert [start["ranks"] for start in starts] == [2]
    assert (folder / "runs" / "slurm" / "model").is_dir()
    assert not (folder / "requeued").exists()


@pytest.mark.parametrize(("status", "requeued"), [(138, True), (1, False)])
def test_the_slurm_script_queues_again_what_was_stopped_in_time(status, requeued, tmp_path):
    assert run_slurm_script(tmp_path, f"#!/bin/bash\nexit {status}\n").returncode == status
    assert (tmp_path / "requeued").exists() == requeued


# --- what else the documents say ---------------------------------------------------------------


def test_the_forward_pass_of_the_network_is_shown_as_it_is():
    body = inspect.getsource(NestedUNet.forward).split('"""\n')[-1]
    for text in (README, read("design.md")):
        assert f"```py\n{textwrap.dedent(body)}```" in text


def test_make_goals_in_the_documents_exist():
    goals = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.MULTILINE))
        assert named
        assert named <= goals, name


def definitions(path):
    """Names that a module defines, and those of its classes as `Class.name`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    named = [node for node in tree.body if isinstance(node, kinds)]
    inner = [(node, part) for node in named for part in node.body if isinstance(part, kinds)]
    values = [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return {
        *(node.name for node in named),
        *(f"{node.name}.{part.name}" for node, part in inner),
        *(target.id for target in values if isinstance(target, ast.Name)),
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_the_files_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)", path.read_text(encoding="utf-8"))
    for target, anchor in links:
        if "://" in target:
            continue
        there = (path.parent / target) if target else path
        assert there.exists(), target
        known = definitions if there.suffix == ".py" else headings
        assert not anchor or anchor in known(there), f"{target}#{anchor}"


def headings(path: Path) -> set[str]:
    """What the headings of a document are called in links."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_listed_in_the_readme():
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert not [name for name in pages if f"](docs/{name})" not in README]


# --- the mechanism itself ----------------------------------------------------------------------


def test_every_command_of_a_document_can_be_shrunk():
    all_words = [words for path in DOCUMENTS for words in commands(read(path.name))]
    assert len([smaller(words) for words in all_words]) > 100
    with pytest.raises(LookupError):
        smaller(["mdm", "train", "mystery"])


@pytest.mark.parametrize("name", SHRUNK)
def test_shrunk_presets_are_valid_and_small(name):
    config = override(preset(*name.split(" --as ")), list(SHRUNK[name]))
    assert config.train.images <= 24
    assert config.train.stages[-1].levels == len(config.model.levels)
