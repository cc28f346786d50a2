"""Export every torchvision classification network, compare it with torch on four images, and write docs/backbones.md's table.

Each network has a child process of its own with random weights (nothing is downloaded): what is checked is the export. The
pictures are made here, or are the first four of `--photos`. Results are kept in a JSON-lines file, so that a stopped run
continues; the document is rewritten from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from benchmarks.soak import machine, make_photos  # noqa: E402

DOCUMENT = REPO / "docs/backbones.md"
BEGIN, END = "<!-- made by `make backbones` -->", "<!-- end -->"
IMAGES = 4


def measure(name: str, photos: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Export one network and compare its features of four images with torch's."""
    import numpy as np
    import torch

    from extractor.backbones.export import to_onnx
    from extractor.backbones.layers import torch_penultimate
    from extractor.backbones.networks import load
    from extractor.backbones.registry import Backbone
    from extractor.graphs.parity import relative_l2
    from extractor.pixels.images import decode
    from extractor.runtime.session import Embedder

    loaded = load(Backbone(name, "random:0"))
    file = folder / "backbone.onnx"
    begin = time.perf_counter()
    facts = to_onnx(loaded, name, file)
    seconds = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in folder.iterdir())
    external = len(list(folder.iterdir())) > 1
    pixels = np.stack([facts.preprocess.pixels(decode(photo.read_bytes())) for photo in photos])
    batch = facts.preprocess.normalise(pixels)
    _, features = torch_penultimate(loaded.network, torch.from_numpy(batch[:1]))
    expected = features(batch)
    parameters = sum(parameter.numel() for parameter in loaded.network.parameters())
    del loaded, features
    found = Embedder(file, batch_size=1)(batch)
    return {
        "name": name,
        "dim": facts.dim,
        "layer": facts.layer,
        "pooling": facts.pooling,
        "input": facts.preprocess.crop,
        "parameters": parameters,
        "bytes": size,
        "external": external,
        "parity": float(relative_l2(found, expected).max()),
        "seconds": round(seconds, 1),
    }


def run_child(name: str, photos: Sequence[Path]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="penult-backbones-") as folder:
        command = [sys.executable, __file__, "--child", name, "--scratch", folder, *map(str, photos)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"name": name, "error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_document(results: dict[str, dict[str, Any]]) -> None:
    """Replace the table between the two marks; the text around it is written by hand."""
    good = [row for row in results.values() if "error" not in row]
    failed = [row for row in results.values() if "error" in row]
    lines = [
        BEGIN,
        "",
        f"{len(good)} of {len(results)} networks, random weights, {IMAGES} images, {machine()}, {date.today()}. Largest "
        f"difference: {max(row['parity'] for row in good):.1e} (relative L2 of a row; the limit is 1e-5).",
        "",
        "| backbone | features | layer | input | parameters | file | against torch | export |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(good, key=lambda row: row["name"]):
        layer = f"{row['layer']}{', averaged' if row['pooling'] == 'average' else ''}"
        size = f"{row['bytes'] / 2**20:.0f} MiB{' (external data)' if row['external'] else ''}"
        lines.append(
            f"| {row['name']} | {row['dim']} | {layer} | {row['input']} | {row['parameters'] / 1e6:.1f} M | {size} "
            f"| {row['parity']:.1e} | {row['seconds']:.0f} s |"
        )
    lines += [f"\n- {row['name']}: **{row['error']}**" for row in failed]
    text = DOCUMENT.read_text() if DOCUMENT.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{chr(10).join(lines)}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these networks alone")
    parser.add_argument("--photos", type=Path, help="a folder with photos")
    parser.add_argument("--results", type=Path, default=REPO / "build/backbones.jsonl", help="where results are kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        answer = sys.stdout
        sys.stdout = sys.stderr  # exporters print
        print(json.dumps(measure(given.child, given.files, given.scratch)), file=answer)
        return
    from extractor.backbones.registry import names

    given.results.parent.mkdir(exist_ok=True, parents=True)
    known = [json.loads(line) for line in given.results.read_text().splitlines()] if given.results.exists() else []
    results = {row["name"]: row for row in known if "error" not in row}
    with tempfile.TemporaryDirectory(prefix="penult-photos-") as folder:
        some = given.photos or make_photos(Path(folder), IMAGES)
        photos = sorted(path for path in some.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:IMAGES]
        for name in given.only or names():
            if name in results:
                continue
            results[name] = run_child(name, photos)
            with given.results.open("a") as file:
                file.write(json.dumps(results[name]) + "\n")
            print(results[name], flush=True)
    write_document(results)
    sys.exit(any("error" in row for row in results.values()))


if __name__ == "__main__":
    main()
