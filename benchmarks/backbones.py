"""Export every torchvision classification network, compare it with torch on four images, and write docs/backbones.md's table.

Each network has a child process of its own with random weights and statistics of batch norms (nothing is downloaded): what is
checked is the export. Where the older of torch's exporters is used, its features must be those of the newer one, bit by bit.
The pictures are made here, or are the first four of `--photos`. Results are kept in a JSON-lines file, so that a stopped run
continues; the document is rewritten from it.
"""

from __future__ import annotations

import argparse
import json
import os
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
BATCHES = 1, 3, 4  # on which the exporters are compared


def measure(name: str, photos: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Export one network with both of torch's exporters, and compare its features of four images with torch's."""
    import numpy as np
    import torch

    from extractor.backbones.export import to_onnx
    from extractor.backbones.layers import torch_penultimate
    from extractor.backbones.networks import load
    from extractor.backbones.registry import Backbone
    from extractor.graphs.parity import relative_l2
    from extractor.graphs.torch_exporters import exported, traced
    from extractor.pixels.images import decode
    from extractor.runtime.session import Embedder
    from store.errors import BadDataError

    loaded = load(Backbone(name, "random:0"))
    randomise_batch_norms(loaded.network)
    newer, older = folder / "newer", folder / "older"
    newer.mkdir()
    older.mkdir()
    file, why = newer / "backbone.onnx", ""
    begin = time.process_time()
    try:
        to_onnx(loaded, name, older / "backbone.onnx", exporters=[traced])
    except BadDataError as error:
        why = str(error)
    middle = time.process_time()
    facts = to_onnx(loaded, name, file, exporters=[exported])
    seconds = (time.process_time() if why else middle) - begin
    size = sum(path.stat().st_size for path in newer.iterdir())
    pixels = np.stack([facts.preprocess.pixels(decode(photo.read_bytes())) for photo in photos])
    batch = facts.preprocess.normalise(pixels)
    _, features = torch_penultimate(loaded.network, torch.from_numpy(batch[:1]))
    expected = features(batch)
    parameters = sum(parameter.numel() for parameter in loaded.network.parameters())
    del loaded, features
    found = Embedder(file, batch_size=1)(batch)
    alike = not why and all(
        np.array_equal(Embedder(older / "backbone.onnx", batch_size=count)(batch), Embedder(file, batch_size=count)(batch))
        for count in BATCHES
    )
    return {
        "name": name,
        "dim": facts.dim,
        "layer": facts.layer,
        "pooling": facts.pooling,
        "input": facts.preprocess.crop,
        "parameters": parameters,
        "bytes": size,
        "external": len(list(newer.iterdir())) > 1,
        "parity": float(relative_l2(found, expected).max()),
        "seconds": round(seconds, 1),
        "exporter": "newer" if why else "older",
        "why": why,
        "alike": alike,
    }


def randomise_batch_norms(network: Any) -> None:
    """Statistics as of a trained network: fresh ones would leave little to fold."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            spread = torch.rand(4, module.num_features, generator=generator)
            for tensor, values in zip(
                (module.weight.data, module.running_var, module.bias.data, module.running_mean),
                (spread[0] + 0.5, spread[1] + 0.5, spread[2] - 0.5, spread[3] - 0.5),
                strict=True,
            ):
                tensor.copy_(values)


def run_child(name: str, photos: Sequence[Path]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="penult-backbones-") as folder:
        command = [sys.executable, __file__, "--child", name, "--scratch", folder, *map(str, photos)]
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # as in penult's own child process
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        return {"name": name, "error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_document(results: dict[str, dict[str, Any]]) -> None:
    """Replace the table between the two marks; the text around it is written by hand."""
    good = [row for row in results.values() if "error" not in row]
    failed = [row for row in results.values() if "error" in row]
    older = [row for row in good if row["exporter"] == "older"]
    unlike = [row["name"] for row in older if not row["alike"]]
    lines = [
        BEGIN,
        "",
        f"{len(good)} of {len(results)} networks, random weights, {IMAGES} images, {machine()}, {date.today()}. Largest "
        f"difference: {max(row['parity'] for row in good):.1e} (relative L2 of a row; the limit is 1e-5). {len(older)} "
        f"are exported by the older of torch's exporters; networks with features that differ from the newer one's in any bit "
        f"(batches of {', '.join(map(str, BATCHES))}): {', '.join(unlike) or 'none'}.",
        "",
        "| backbone | features | layer | input | parameters | file | against torch | exporter | export, core-s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(good, key=lambda row: row["name"]):
        layer = f"{row['layer']}{', averaged' if row['pooling'] == 'average' else ''}"
        size = f"{row['bytes'] / 2**20:.0f} MiB{' (external data)' if row['external'] else ''}"
        lines.append(
            f"| {row['name']} | {row['dim']} | {layer} | {row['input']} | {row['parameters'] / 1e6:.1f} M | {size} "
            f"| {row['parity']:.1e} | {row['exporter']} | {row['seconds']:.1f} |"
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
    sys.exit(any("error" in row or (row["exporter"] == "older" and not row["alike"]) for row in results.values()))


if __name__ == "__main__":
    main()
