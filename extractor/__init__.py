"""From images to features: data, pixels, networks, the runtime and the pipeline that fills a cache.

The names in ``__all__`` are public. Each is imported when it is first asked for, so that importing this package is cheap.

>>> import extractor
>>> extractor.extract("pets/", "tiny.onnx", "pets.cache", extractor.Options(quiet=True)).dim
16
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from store.faces import lazily  # importing store first sets the environment of libraries

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
    __getattr__, __dir__ = lazily(__name__, HOME)
