"""From files to features: sources, pixels, backbones, the ONNX session and the pipeline that fills a cache."""
