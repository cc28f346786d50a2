"""From images to features: data, pixels, networks, the runtime and the pipeline that fills a cache.

The names in ``__all__`` are public. Each is imported when it is first asked for, so that importing this package is cheap.

>>> import extractor
>>> extractor.extract("pets/", "tiny.onnx", "pets.cache", extractor.Options(quiet=True)).dim
16
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import store  # noqa: F401 - its environment comes before any library that reads it

if TYPE_CHECKING:
    from .backbones.export import export as export
    from .backbones.registry import Backbone as Backbone
    from .data.sources import open_source as open_source
    from .pipeline.run import extract as extract
    from .pipeline.settings import Options as Options

HOME = {
    "Backbone": "backbones.registry",
    "Options": "pipeline.settings",
    "export": "backbones.export",
    "extract": "pipeline.run",
    "open_source": "data.sources",
}
__all__ = sorted(HOME)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in HOME:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message)
        return getattr(importlib.import_module(f"{__name__}.{HOME[name]}"), name)

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
