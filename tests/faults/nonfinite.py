"""Promise 8: steps that are not finite change nothing, are told with their samples, and end."""

from __future__ import annotations

import re
from pathlib import Path

from faults.product import BATCH, IMAGES, Ended, Run, Workshop
from faults.report import Result
from matryoshka_diffusion.train.checkpoint import TENSORS

EVERY_STEP = (f"train.checkpoint_every_images={BATCH}", "train.keep_checkpoints=1000")
PATIENCE = 20
"""Steps in a row that may be skipped, as the documents say."""


def skipped(shop: Workshop, result: Result, until: float) -> None:
    """NaN in pixels, in two steps in a row, and Inf in one gradient."""
    *broken, overflow = shop.chance.sample(range(2, IMAGES // BATCH - 2, 3), 5)
    samples = {step: [BATCH * step + shop.chance.randrange(BATCH)] for step in broken}
    samples[broken[0] + 1] = [BATCH * (broken[0] + 1) + row for row in (1, 6)]
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
    lines = {line["images_seen"]: line for line in run.lines()}
    for count, (step, numbers) in enumerate(sorted(samples.items()), 1):
        line, where = lines[BATCH * (step + 1)], f"{run.folder}, step {step}"
        result.counts["steps made not finite"] += 1
        result.expect(_is_unchanged(run, step), f"{where}: it changed", "changed weights")
        result.expect(
            line["skipped_ids"] == numbers and line["skipped"] == count,
            f"{where}: {line}",
            "not counted",
        )
        result.expect(_told(ended.errors, step) == numbers[:4], f"{where}: not told", "not told")
    good = [step for step in range(1, num_steps) if step not in samples]
    lost = [step for step in good if _is_unchanged(run, step)]
    result.counts["good steps between them"] += len(good)
    result.expect(not lost, f"{run.folder}: nothing was learnt at {lost}", "lost steps")


def _is_unchanged(run: Run, step: int) -> bool:
    """Whether weights, averages and moments are bit for bit those before the step."""
    kept = {Path(name): hashed for name, hashed in run.kept().items() if "safetensors" in name}
    before, after = (
        {path.name: hashed for path, hashed in kept.items() if path.parent.name == f"{number:010d}"}
        for number in (BATCH * step, BATCH * (step + 1))
    )
    assert len(before) >= len(TENSORS)
    return before == after


def _told(errors: str, step: int) -> list[int]:
    """The samples that a warning names for a step."""
    found = re.search(rf"step skipped at {BATCH * step:,} images: .*; samples (.*)", errors)
    return [int(number) for number in re.findall(r"(\d+) \(\d\.tar:", found[1])] if found else []


def bounded(shop: Workshop, result: Result, until: float) -> None:
    """From some step on every one is broken: the run stops, and what it saved is finite."""
    first = shop.chance.randrange(4, 20)
    run = shop.run("never-finite")
    ended = run.go(poison=[BATCH * step for step in range(first, IMAGES // BATCH)])
    result.counts["steps made not finite"] += PATIENCE
    stopped = f"{PATIENCE} steps in a row, up to {BATCH * (first + PATIENCE):,} images"
    result.expect(
        ended.status == 1 and stopped in ended.errors and "Traceback" not in ended.errors,
        f"{run.folder}: status {ended.status}: {ended.errors}",
        "not told",
    )
    dump = run.folder / "not-finite.json"
    result.expect(
        dump.is_file() and str(dump) in ended.errors, f"{run.folder}: no dump", "not told"
    )
    saved = run.snapshot()
    tensors = [*saved.weights.values(), *saved.ema.values(), *saved.optimizer.values()]
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
    result.expect(
        finite and saved.state["steps"] == first,
        f"{run.folder}: saved after {saved.state['steps']} steps, finite: {finite}",
        "changed weights",
    )
