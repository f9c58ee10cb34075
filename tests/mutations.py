"""Wrong changes of the core and of saving, each of which some test must notice.

    python tests/mutations.py [--only NUMBER ...]

Each mutation is made in a copy of the package, and the tests that know the file run against it.
The last line counts the mutations that no test noticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    """Replace `old`, which must occur in `file`, by `new`; `tests` are to fail then."""

    file: str
    old: str
    new: str
    tests: str


LOSS, NEST, SAVE = "diffusion oracle", "nested minimal", "checkpoint files promises"
MUTATIONS = [
    Mutation("pyramid.py", ":: source // frames", "1 :: source // frames", "pyramid"),
    Mutation("pyramid.py", "share_left -= mix[level]", "share_left += mix[level]", "pyramid"),
    Mutation("schedule.py", "(k / STEPS + 0.008)", "(k / STEPS + 0.08)", "schedule reference"),
    Mutation("schedule.py", "log_snr(t) - self.power", "log_snr(t) + self.power", "schedule"),
    Mutation("schedule.py", "torch.sigmoid(-log_snr)", "torch.sigmoid(log_snr)", "schedule"),
    Mutation("diffusion.py", "expand(sigma, x_r) * noise_r", "expand(alpha, x_r) * noise_r", LOSS),
    Mutation("diffusion.py", "noise - expand(sigma, x) * x", "noise + expand(sigma, x) * x", LOSS),
    Mutation("diffusion.py", "alpha * z - sigma", "alpha * z + sigma", LOSS),
    Mutation("diffusion.py", "max(counts[level], 1)", "max(counts[0], 1)", LOSS),
    Mutation("diffusion.py", "process.level_weights[level] *", "process.level_weights[0] *", LOSS),
    Mutation("denoiser.py", "low <= level.log_snr", "low >= level.log_snr", "denoiser samplers"),
    Mutation("samplers.py", "ratio**2 * s.sigma**2\n", "ratio * s.sigma**2\n", "samplers oracle"),
    Mutation("samplers.py", "h / (2.0 * past)", "h / past", "samplers oracle"),
    Mutation("samplers.py", "1.0 / STEPS]", "2.0 / STEPS]", "samplers"),
    Mutation("philox.py", "[*counters,", "[0, *counters[1:],", "rng"),
    Mutation("nn/nested.py", "outward(h[:", "outward(-h[:", NEST + " reference"),
    Mutation("nn/nested.py", '_seed(seed, "level", place)', '_seed(seed, "level")', NEST),
    Mutation("nn/nested.py", "2 * model.channels", "3 * model.channels", "upsampler nested"),
    Mutation("nn/norms.py", "1 + scale", "scale", "reference minimal"),
    Mutation("nn/norms.c", "1.0f + scale[c]", "scale[c]", "norms"),
    Mutation("nn/lora.py", "/ lora.rank", "* lora.rank", "lora"),
    Mutation("training/stages.py", "train.images - life_from)", "train.images)", "stages"),
    Mutation("training/stages.py", "ends_stage=count == left", "ends_stage=True", "stages trainer"),
    Mutation("training/averages.py", "(1 + s) / (10 + s))", "(1 + s) / (11 + s))", "averages"),
    Mutation("training/gradient.py", "_foreach_div_", "_foreach_mul_", "step"),
    Mutation("training/checkpoint.py", "[keep:]", "[keep - 1 :]", SAVE),
    Mutation("training/checkpoint.py", "sync_folder(folder)", "pass", SAVE),
    Mutation("training/checkpoint.py", "reverse=True", "reverse=False", SAVE),
    Mutation("files.py", "os.fsync(file.fileno())", "pass", SAVE),
    Mutation(
        "files.py",
        "        os.replace(temporary, path)",
        "        shutil.copy(temporary, path)",
        SAVE,
    ),
    Mutation("data/loader.py", '"crop", n)', '"crop", 0)', "loader augment source"),
]


def is_noticed(mutation: Mutation) -> bool:
    """Run the tests against the mutated package; True if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy)
        path = copy / "matryoshka_diffusion" / mutation.file
        text = path.read_text(encoding="utf-8")
        if mutation.old not in text:
            raise SystemExit(f"{mutation.file} has no {mutation.old!r}: correct tests/mutations.py")
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        tests = [f"tests/test_{name}.py" for name in mutation.tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        paths = os.pathsep.join([str(copy), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        options = ["-o", f"pythonpath={copy} {ROOT}", *tests]
        return subprocess.run(
            [*command, *options], cwd=ROOT, env=environment, capture_output=True, check=False
        ).returncode in (1, 2)


def main() -> int:
    """Try the mutations; returns the number that no test noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*", default=range(len(MUTATIONS)))
    unnoticed = 0
    for number in parser.parse_args().only:
        mutation = MUTATIONS[number]
        noticed = is_noticed(mutation)
        unnoticed += not noticed
        word = "noticed" if noticed else "NOT NOTICED"
        change = f"{mutation.old.strip()} -> {mutation.new.strip()}"
        print(f"{number:2} {word:11} {mutation.file}: {change}", flush=True)
    print(f"{unnoticed} of the mutations were not noticed")
    return unnoticed


if __name__ == "__main__":
    sys.exit(main())
