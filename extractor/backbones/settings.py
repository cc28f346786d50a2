"""Settings of a backbone: network, weights, layers, and the input of a custom ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator

from extractor.settings import PLACE, Settings, rule, setting

if TYPE_CHECKING:
    from .registry import Backbone
from extractor.settings import Names, as_tuple


def _channels(value: tuple[float, ...]) -> tuple[float, ...]:
    if len(value) not in (1, 3):
        message = "one number, or three: red, green, blue"
        raise ValueError(message)
    return value


def _range(value: float) -> float:
    if value not in (1, 255):
        message = "1 or 255"
        raise ValueError(message)
    return float(value)


def _name_or_file(value: Any) -> Any:
    """Resolve a file relative to the folder of the job file; keep a name."""
    from .registry import FILE_SUFFIXES

    if isinstance(value, Path) or (isinstance(value, str) and value.lower().endswith(FILE_SUFFIXES)):
        return str(PLACE.get().folder / value)
    return value


Channels = Annotated[tuple[float, ...] | None, BeforeValidator(as_tuple), AfterValidator(lambda v: v and _channels(v))]
NameOrFile = Annotated[str, BeforeValidator(_name_or_file)]


class BackboneSettings(Settings):
    section: ClassVar[str] = "backbone"
    heading: ClassVar[str] = "Backbone"


class SizeSettings(BackboneSettings):
    resize: int | None = setting(None, "Shorter side after resizing.", metavar="PIXELS", shown="the preset's")
    crop: int | None = setting(None, "Side of the centred crop.", metavar="PIXELS", shown="the preset's")


class PixelSettings(SizeSettings):
    preset: str | None = setting(None, "Torchvision weights whose preprocessing a .pth file goes with.", metavar="NAME")
    pixel_path: Literal["pillow", "pillow-crop", "pillow-draft"] | None = setting(
        None,
        "How files become pixels; all but the reference are faster and not quite equal (docs/images.md).",
        shown="pillow",
    )


def backbone_of(settings: Settings, name: str = "") -> Backbone:
    """The `Backbone` that settings describe."""
    from .registry import BACKBONE_FIELDS, Backbone

    return Backbone(name, **{each: getattr(settings, each) for each in BACKBONE_FIELDS if each in type(settings).model_fields})


class NetworkSettings(PixelSettings):
    backbone: NameOrFile = setting(
        ..., "Network; `penult backbones` lists them.", short="-m", key="name", metavar="NAME|FILE.onnx"
    )
    weights: NameOrFile | None = setting(
        None, "Torchvision's by name, a state dict, or untrained.", metavar="NAME|FILE.pth|random[:SEED]", shown="torchvision's"
    )

    def network(self) -> Backbone:
        """The requested backbone."""
        return backbone_of(self, self.backbone)

    @rule
    def _known(self) -> None:
        from .registry import check_request

        check_request(self.network(), lambda name: f"<{name}>")


class PoolingSettings(BackboneSettings):
    pooling: Literal["average", "max", "class", "patches", "class+mean", "token"] | None = setting(
        None,
        "How a layer that is not a vector becomes one. Of a transformer: its class token (token is an older name for it), the "
        "average of its patches, or both side by side.",
        shown="average",
    )


class LayerSettings(PoolingSettings):
    layers: Names = setting(
        (),
        "Where to take features from, instead of the penultimate layer; repeat it for several feature sets.",
        flag="--layer",
        metavar="NAME",
        repeat=True,
    )

    @rule
    def _no_layer_twice(self) -> None:
        if twice := sorted({layer for layer in self.layers if self.layers.count(layer) > 1}):
            message = f"<layers> names {', '.join(twice)} twice"
            raise ValueError(message)


class OnnxInputSettings(BackboneSettings):
    heading: ClassVar[str] = "Input of a custom ONNX file (docs/backbones.md)"

    mean: Channels = setting(None, "Subtracted from pixels of 0 to the input range; one number or three.", metavar="R[,G,B]")
    std: Channels = setting(None, "What they are then divided by; one number or three.", metavar="R[,G,B]")
    input_range: Annotated[float, AfterValidator(_range)] | None = setting(
        None, "The largest pixel value before that: 1, or 255 for raw values.", metavar="1|255", shown="1"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box"] | None = setting(
        None, "How images are resized.", shown="bilinear"
    )
    channels: Literal["rgb", "bgr"] | None = setting(None, "Order of the channels.", shown="rgb")
    squash: bool | None = setting(None, "Resize to the square, without a crop.")
    layout: Literal["nchw", "nhwc"] | None = setting(None, "Order of the axes.", shown="from its shape")


class SidecarSettings(OnnxInputSettings, LayerSettings, SizeSettings):
    """Settings in ``net.toml`` beside ``net.onnx``; there the key for layers is ``layer``."""


class ExportSettings(NetworkSettings, LayerSettings, OnnxInputSettings):
    """Settings of `penult export`."""
