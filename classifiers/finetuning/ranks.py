"""Fine-tuning on several devices, one process each: torch's DistributedDataParallel through Lightning.

Their only result is the checkpoint that the first process writes after every epoch, so they may be killed at any time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from extractor.backbones import networks
from extractor.runtime.cuda import number_of
from extractor.signals import StopFlag
from store.errors import InterruptedRunError, PenultError, answer_of, raise_answered

from .checkpoints import FAILURE, RENDEZVOUS
from .module import DivergedError, end_to_end
from .trainer import Plan, isolated, run_epochs

LOOK = 0.5  # seconds between looks at the stop flag


def run_on_all(plan: Plan, facts: dict[str, Any], stop: StopFlag) -> None:
    """Call `run_epochs` on all devices of a plan.

    Raises:
        PenultError: the error of the first process that failed.
        InterruptedRunError: the flag was set.
    """
    from torch.multiprocessing.spawn import ProcessException, start_processes

    failure, rendezvous = (plan.checkpoints.folder / name for name in (FAILURE, RENDEZVOUS))
    for left in (failure, rendezvous):
        left.unlink(missing_ok=True)
    count = len(plan.devices)
    start: Any = start_processes
    state, passed = plan.state(), get_context("spawn").Value("q", 0)
    before = int(state["training"]["images"]) if state else 0
    context = start(_run, (plan, facts, rendezvous, passed), count, join=False, start_method="spawn")
    try:
        with plan.stage(measure=lambda: before + passed.value):
            while not context.join(timeout=LOOK):
                if stop:
                    raise InterruptedRunError(stop.signum)
    except ProcessException:
        if failure.exists():
            raise_answered(json.loads(failure.read_text("utf-8")), DivergedError)
        raise
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _run(rank: int, plan: Plan, facts: dict[str, Any], rendezvous: Path, passed: Any) -> None:
    """The work of one process; the first counts the images in ``passed``, a number that it shares with the parent."""

    def advance(images: int) -> None:
        if rank == 0:
            passed.value += images

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent ends it
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}  # with these set, Lightning starts no processes of its own
    with _group(rank, plan.devices, rendezvous):
        try:
            with isolated([plan.devices[rank]], plan.options.seed):
                loaded = networks.load(plan.backbone)
                model = end_to_end(loaded, plan)
                run_epochs(plan, loaded, model, facts, StopFlag(), advance, rank)
        except PenultError as error:
            Path(plan.checkpoints.folder / FAILURE).write_text(json.dumps(answer_of(error)), "utf-8")
            raise


@contextmanager
def _group(rank: int, devices: Sequence[str], rendezvous: Path) -> Iterator[None]:
    """The process group of all devices, which Lightning then uses; ``rendezvous`` is the path of a new file.

    Lightning's own group meets at 127.0.0.1: torch then listens on every interface and looks that address up by DNS.
    """
    import torch.distributed

    on_cpu = devices[rank] == "cpu"
    if on_cpu:  # else gloo would look up this machine's name; the first interface is the loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", socket.if_nameindex()[0][1])
    torch.distributed.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=torch.distributed.FileStore(str(rendezvous), len(devices)),  # type: ignore[attr-defined]
        rank=rank,
        world_size=len(devices),
        device_id=None if on_cpu else torch.device("cuda", number_of(devices[rank])),
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
