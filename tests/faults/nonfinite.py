"""Promise 8: steps that are not finite change nothing, are named with their samples, and end."""

from __future__ import annotations

import re

from faults.product import BATCH, IMAGES, Ended, Run, Workshop
from faults.report import Result
from matryoshka_diffusion.training import checkpoint

EVERY_STEP = (f"train.checkpoint_every_images={BATCH}", "train.keep_checkpoints=1000")
PATIENCE = 20
"""Steps in a row that may be skipped, as the documents say."""


def skipped(shop: Workshop, result: Result, until: float) -> None:
    """NaN in pixels, in two steps in a row, and Inf in one gradient."""
    *broken, overflow = shop.chance.sample(range(2, IMAGES // BATCH - 2, 3), 5)
    samples = {step: [BATCH * step + shop.chance.randrange(BATCH)] for step in broken}
    # Before it, since the first step of a stage changes the files of weights also if it is skipped.
    samples[broken[0] - 1] = [BATCH * (broken[0] - 1) + row for row in (1, 6)]
    poisoned = [number for numbers in samples.values() for number in numbers]
    run = shop.run("not-finite", *EVERY_STEP)
    ended = run.go(poison=poisoned, overflow=overflow + 1)
    samples[overflow] = list(range(BATCH * overflow, BATCH * (overflow + 1)))
    judge(result, run, ended, samples, IMAGES // BATCH)


def judge(
    result: Result, run: Run, ended: Ended, samples: dict[int, list[int]], num_steps: int
) -> None:
    """Steps were skipped, each for some samples, and no others."""
    result.expect(ended.status == 0, f"{run.folder}: {ended.errors}")
    lines, states = {line["images_seen"]: line for line in run.lines()}, _states(run)
    unchanged = {step for step in range(1, num_steps) if states[step] == states[step + 1]}
    for count, (step, numbers) in enumerate(sorted(samples.items()), 1):
        line, where = lines[BATCH * (step + 1)], f"{run.folder}, step {step}"
        result.counts["steps made not finite"] += 1
        result.expect(step in unchanged, f"{where}: it changed", "changed weights")
        counted = line["skipped_ids"] == numbers and line["skipped"] == count
        result.expect(counted, f"{where}: {line}", "not counted")
        warning = re.search(rf"skipped at {BATCH * step:,} images: .*; samples (.*)", ended.errors)
        named = re.findall(r"(\d+) \(\d\.tar:", warning[1] if warning else "")
        result.expect(list(map(int, named)) == numbers[:4], f"{where}: {named}", "not told")
    lost = unchanged - samples.keys()
    result.counts["good steps between them"] += num_steps - 1 - len(samples)
    result.expect(not lost, f"{run.folder}: nothing was learnt at {lost}", "lost steps")


def _states(run: Run) -> dict[int, dict[str, str]]:
    """Hashes of weights, averages and moments after each step."""
    states: dict[int, dict[str, str]] = {}
    for name, digest in run.kept().items():
        place, file = name.split("/")
        if file.endswith(".safetensors"):
            states.setdefault(int(place) // BATCH, {})[file] = digest
    assert all(len(state) >= len(checkpoint.TENSORS) for state in states.values())
    return states


def bounded(shop: Workshop, result: Result, until: float) -> None:
    """From some step on every one is broken: the run stops, and what it saved is finite."""
    first = shop.chance.randrange(4, 20)
    run = shop.run("never-finite")
    ended = run.go(poison=[BATCH * step for step in range(first, IMAGES // BATCH)])
    result.counts["steps made not finite"] += PATIENCE
    words = f"{PATIENCE} steps in a row, up to {BATCH * (first + PATIENCE):,} images"
    clear = ended.status == 1 and words in ended.errors and "Traceback" not in ended.errors
    result.expect(clear, f"{run.folder}: {ended}", "not told")
    dump = run.folder / "not-finite.json"
    named = dump.is_file() and str(dump) in ended.errors
    result.expect(named, f"{run.folder}: no dump", "not told")
    saved = checkpoint.read(run.checkpoints / f"{run.newest():010d}")
    tensors = [*saved.weights.values(), *saved.ema.values(), *saved.optimizer.values()]
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
    result.expect(
        finite and saved.state["steps"] == first,
        f"{run.folder}: saved after {saved.state['steps']} steps, finite: {finite}",
        "changed weights",
    )
