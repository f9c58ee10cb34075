"""`--gpus N`: the same command once for each GPU of this machine, under torch's elastic agent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

SAVING_SECONDS = 600
"""How long ranks may take to save after a signal; torch's agent would kill them after 30 s."""


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run `mdm` with `arguments` in `ranks` processes that find each other; returns the status.

    A signal to this process reaches all of them, and they save before they leave.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_SECONDS))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # The agent's own log repeats what the ranks say.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "matryoshka_diffusion.cli", *arguments)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has said what was wrong
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"mdm: rank {rank} was ended by {name}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0
