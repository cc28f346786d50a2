"""The history of fine-tuning, written after every epoch: ``metrics.csv``, and TensorBoard events if it is installed."""

from __future__ import annotations

import csv
import io
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from store.format import atomic
from store.format.output import write_output

log = logging.getLogger("penult.classifiers")

METRICS = "metrics.csv"
SCALARS = {  # name of the chart in TensorBoard: key of a row of the history
    "loss/train": "train_loss",
    "loss/validation": "val_loss",
    "accuracy/validation": "val_accuracy",
    "learning rate/network": "lr",
    "learning rate/head": "head_lr",
}


def history_writer(folder: Path) -> Any:
    """A Lightning callback that writes the module's history after every validation; a resumed run continues it."""
    from lightning.pytorch.callbacks import Callback

    class HistoryWriter(Callback):
        events: Any = None

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            atomic.make_directory(folder)
            if find_spec("tensorboard") is None:
                log.info("%s gets only %s: tensorboard is not installed", folder, METRICS)
                return
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(folder), purge_step=len(pl_module.history))  # drops events of a repeated epoch

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, pl_module.history[0])
            writer.writeheader()
            writer.writerows(pl_module.history)
            write_output(folder / METRICS, text.getvalue().encode(), overwrite=True)
            if self.events is not None:
                row = pl_module.history[-1]
                for name, key in SCALARS.items():
                    if row[key] is not None:
                        self.events.add_scalar(name, row[key], row["epoch"])
                self.events.flush()

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if self.events is not None:
                self.events.close()

    return HistoryWriter()
