"""The settings of using a bundle: predicting, evaluating, and the gates of a result."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import create_model

from classifiers.evaluation.gates import GATES, Gate, require_gates, wanted_gates
from extractor.pipeline.settings import DeviceSettings
from extractor.settings import PLACE, FilePath, Settings, setting


class HeldOutSettings(Settings):
    section: ClassVar[str] = "gate"
    heading: ClassVar[str] = "Images"

    split: Literal["train", "val", "test"] | None = setting(None, "Which part.", shown="what was held out in training")


class _Gates(Settings):
    section: ClassVar[str] = "gate"
    heading: ClassVar[str] = "Gates: exit code 65 where one is not met"


_GATE_FIELDS: Any = {
    gate.name: (float | None, setting(None, gate.help, ge=gate.least, le=gate.most, metavar="X")) for gate in GATES
}


class GateSettings(HeldOutSettings, create_model("GateSettings", __base__=_Gates, **_GATE_FIELDS)):  # type: ignore[misc]
    """What a result must reach: a job's section ``[gate]``."""

    def wanted(self, task: str) -> dict[Gate, float]:
        """The gates that are asked for.

        Raises:
            UsageError: one is on a metric that a task does not have.
        """
        gates, place = wanted_gates({gate.name: getattr(self, gate.name) for gate in GATES}), PLACE.get()
        require_gates(gates, task, lambda gate: place.spell(type(self), gate.name))
        return gates


class PredictSettings(DeviceSettings):
    """What `penult predict` takes."""

    heading: ClassVar[str] = "Where and how fast"

    accept_pixels: bool = setting(
        False, "Go on where this machine decodes images otherwise than the training did, and say how much that changes."
    )

    def runtime(self) -> dict[str, Any]:
        """As a `Predictor` takes it."""
        return {name: getattr(self, name) for name in PredictSettings.model_fields}


class RootSettings(Settings):
    heading: ClassVar[str] = "Images"

    root: FilePath = setting(None, "Where the images are, if they moved.", metavar="FOLDER")


class EvaluateSettings(GateSettings, RootSettings, PredictSettings):
    """What `penult evaluate` takes."""
