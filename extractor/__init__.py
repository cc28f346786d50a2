"""From files to features: sources, pixels, backbones, the ONNX session and the pipeline that fills a cache."""

import store  # noqa: F401 - its environment comes before any library that reads it
