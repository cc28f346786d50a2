"""Checkpoints of fine-tuning: the last finished epoch in one file, from which a killed run continues.

The file holds everything: weights, optimiser, schedules, random numbers, the history and the best epoch's weights. It is
replaced atomically, and read with ``weights_only``, which executes nothing.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from extractor.graphs import onnx_file
from store.errors import OutputExistsError
from store.fingerprint import Fingerprint, short
from store.format import atomic
from store.format.lock import file_lock

log = logging.getLogger("penult.classifiers")

LAST = "last.ckpt"
FAILURE, RENDEZVOUS = "failure.json", "rendezvous"  # of several processes, see `ranks`
NETWORK = "backbone.onnx"  # of the finished training, until the bundle has it


@dataclass(frozen=True)
class Checkpoints:
    """The place of the state of an unfinished fine-tuning.

    Attributes:
        folder: a folder for the checkpoint alone.
        out: the result being made, for messages.
        images: digest of the training and validation images and their labels.
        overwrite: whether the state of another run may be thrown away.
    """

    folder: Path
    out: str = "this fine-tuning"
    images: str = ""
    overwrite: bool = False

    @classmethod
    def beside(cls, out: Path, images: str, *, overwrite: bool) -> Self:
        """Checkpoints in a hidden folder beside the bundle being made."""
        return cls(out.with_name(f".{out.name}.unfinished"), str(out), images, overwrite)

    @classmethod
    @contextmanager
    def passing(cls) -> Iterator[Self]:
        """Checkpoints in a temporary folder, for one run."""
        with tempfile.TemporaryDirectory(prefix="penult-", ignore_cleanup_errors=True) as folder:
            yield cls(Path(folder))

    @property
    def file(self) -> Path:
        return self.folder / LAST

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and lock it; it stays if an epoch was finished.

        Raises:
            LockedError: another run works here.
        """
        atomic.make_directory(self.folder)
        with file_lock(self.folder / ".lock", what=self.out):
            try:
                yield
            finally:
                if not self.file.exists():
                    self.remove()

    def remove(self) -> None:
        """Delete the checkpoint and what was made of it, and the folder if nothing else is in it."""
        with suppress(OSError):
            onnx_file.remove_unfinished(self.folder / NETWORK)
            onnx_file.remove(self.folder / NETWORK)
            atomic.remove_leftovers(self.folder, LAST.__eq__)
            for name in (FAILURE, RENDEZVOUS, LAST, ".lock"):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()

    def read(self) -> dict[str, Any] | None:
        """The state of the last finished epoch; None if there is none that can be read."""
        import torch

        if not self.file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
            state["run"], state["training"]["history"]
        except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ...
            log.warning("%s cannot be used (%s): starting over", self.file, str(error).partition("\n")[0])
            return None
        return state

    def resume(self, facts: dict[str, Any]) -> dict[str, Any] | None:
        """The state to continue from; None to start.

        Args:
            facts: everything that decides the result, as JSON.

        Raises:
            OutputExistsError: the checkpoint is of a run with other facts, and may not be thrown away.
        """
        state = self.read()
        if state is None:
            return None
        differences = Fingerprint(json.loads(state["run"]["decided"])).differences(Fingerprint(_plain(facts)))
        epoch = state["training"]["history"][-1]["epoch"]
        if not differences:
            part = " of the refit" if state["training"]["choice"] else ""
            log.info("continuing after epoch %d%s of an unfinished run (%s)", epoch, part, self.folder)
            return state
        listing = "; ".join(f"{name}: {short(then)}, now {short(now)}" for name, (then, now) in differences.items())
        if not self.overwrite:
            message = (
                f"{self.out} has an unfinished run of {epoch} epoch(s) with other settings ({listing}). "
                f"The command that began it continues it; --overwrite throws it away"
            )
            raise OutputExistsError(message)
        log.warning("an unfinished run of %d epoch(s) is thrown away (%s)", epoch, listing)
        self.file.unlink()
        return None

    def keeper(self, facts: dict[str, Any], *, earlier: float) -> Any:
        """The Lightning callback that writes the file after every epoch, and restores the random state on resuming.

        Args:
            facts: as for `resume`.
            earlier: seconds that earlier runs took.
        """
        import torch
        from lightning.pytorch.callbacks import Checkpoint

        begin, file = time.perf_counter(), self.file

        class Keeper(Checkpoint):  # with this base class it runs after early stopping
            generators: dict[str, Any] | None = None

            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                trainer.save_checkpoint(file)

            def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
                on_gpu = pl_module.device.type == "cuda"
                checkpoint["run"] = {
                    "decided": json.dumps(_plain(facts)),
                    "finished": trainer.should_stop or trainer.current_epoch + 1 >= trainer.max_epochs,
                    "seconds": earlier + time.perf_counter() - begin,
                    "cpu": torch.get_rng_state(),
                    "cuda": torch.cuda.get_rng_state(pl_module.device) if on_gpu else None,
                }

            def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
                self.generators = checkpoint["run"]

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                if self.generators is not None:  # not earlier: starting up draws random numbers again
                    torch.set_rng_state(self.generators["cpu"])
                    if self.generators["cuda"] is not None:
                        torch.cuda.set_rng_state(self.generators["cuda"], pl_module.device)

        return Keeper()


def checkpoint_io() -> Any:
    """The Lightning plugin that writes checkpoints atomically, and reads them without executing anything."""
    import torch
    from lightning.pytorch.plugins.io import CheckpointIO

    class WholeFiles(CheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            buffer = io.BytesIO()
            torch.save(checkpoint, buffer)
            atomic.commit(Path(path), buffer.getvalue())

        def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state

        def remove_checkpoint(self, path: Any) -> None:
            Path(path).unlink(missing_ok=True)

    return WholeFiles()


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts after a round trip through JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain
