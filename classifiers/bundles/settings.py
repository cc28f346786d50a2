"""Settings models for using a bundle: prediction, evaluation, and gates."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import create_model

from classifiers.evaluation.gates import GATES, Gate, requested_gates, require_gates
from extractor.runtime.settings import DeviceSettings
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
    """The limits that a result must meet: the section ``[gate]`` of a job."""

    def gates(self, task: str) -> dict[Gate, float]:
        """The gates that are set, with their limits.

        Raises:
            UsageError: a gate is for a metric that the task does not have.
        """
        gates, place = requested_gates({gate.name: getattr(self, gate.name) for gate in GATES}), PLACE.get()
        require_gates(gates, task, lambda gate: place.spell(type(self), gate.name))
        return gates


class PredictSettings(DeviceSettings):
    """The settings of `penult predict`."""

    heading: ClassVar[str] = "Where and how fast"

    accept_pixels: bool = setting(
        False, "Continue if this machine decodes images differently than the training did, and measure the difference."
    )

    def runtime(self) -> dict[str, Any]:
        """These settings as keyword arguments of a `Predictor`."""
        return {name: getattr(self, name) for name in PredictSettings.model_fields}


class RootSettings(Settings):
    heading: ClassVar[str] = "Images"

    root: FilePath = setting(None, "Where the images are, if they moved.", metavar="FOLDER")


class EvaluateSettings(GateSettings, RootSettings, PredictSettings):
    """The settings of `penult evaluate`."""
