"""The Python of the README and of the documents runs as it stands."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def test_the_python_blocks_run(
    backbone_file: Path,
    make_image: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i in range(20):
        make_image(tmp_path / "pets" / ("cat" if i % 2 else "dog") / f"{i}.png", seed=i)
    shutil.copyfile(backbone_file, tmp_path / "squeezenet.onnx")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for page in ("README.md", "docs/regression.md", "docs/python.md", "docs/data.md"):
        for block in re.findall(r"```python\n(.*?)```", (REPO / page).read_text(), re.DOTALL):
            exec(compile(block.replace('"resnet18"', '"squeezenet.onnx"'), page, "exec"), names)  # no download
    out = capsys.readouterr().out
    assert len(re.findall(r"^pets/\w+/\d+\.png (cat|dog) 0\.\d+", out, re.MULTILINE)) == 3
    assert re.search(r"^00000-[0-9a-f]{12}\.h5 \(20, 512\) float16 ", out, re.MULTILINE)
    assert out.endswith("20 b'train-0.tar/cat-1.png' cat train\n")
