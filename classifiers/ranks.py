"""Several devices, a process each, that train one network: torch's DistributedDataParallel through Lightning.

All that comes back is the checkpoint that the first process writes after every epoch; so they may be killed at any time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import store.errors
from extractor import backbones
from extractor.progress import StopFlag
from store.errors import InterruptedRunError, PenultError

from .checkpoints import FAILURE
from .epochs import Plan, isolated, run_epochs
from .training import DivergedError, end_to_end

LOOK = 0.5  # seconds between looks at the stop flag


def run_on_all(plan: Plan, decided: dict[str, Any], stop: StopFlag) -> None:
    """`run_epochs` on all devices of a plan.

    Raises:
        PenultError: what the first process to fail raised.
        InterruptedRunError: the flag was set.
    """
    from torch.multiprocessing.spawn import ProcessException, start_processes

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    failure = plan.checkpoints.folder / FAILURE
    failure.unlink(missing_ok=True)
    count = len(plan.devices)
    start: Any = start_processes
    context = start(_run, (plan, decided, port), count, join=False, start_method="spawn")
    try:
        while not context.join(timeout=LOOK):
            if stop:
                raise InterruptedRunError(stop.signum)
    except ProcessException as error:
        if failure.exists():
            name, message = json.loads(failure.read_text("utf-8"))
            raise {**vars(store.errors), "DivergedError": DivergedError}[name](message) from error
        raise
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _run(rank: int, plan: Plan, decided: dict[str, Any], port: int) -> None:
    """One of the processes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # who started it ends it
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    os.environ.update(address)  # with a local rank set, Lightning starts no processes of its own
    try:
        with isolated([plan.devices[rank]], plan.options.seed):
            loaded = backbones.load(plan.backbone)
            model = end_to_end(loaded, plan.counts, plan.options, plan.start)
            run_epochs(plan, loaded, model, decided, StopFlag(), rank)
    except PenultError as error:
        Path(plan.checkpoints.folder / FAILURE).write_text(json.dumps([type(error).__name__, str(error)]), "utf-8")
        raise
