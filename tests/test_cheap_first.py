"""Of two mistakes the cheap one is named first: before torch is imported, and before an image is opened."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import classifiers
from classifiers.heads.registry import make_head
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.machine import nvidia_driver_present
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache

REPO = Path(__file__).resolve().parent.parent
# Runs a command and says what it imported and which images it opened.
WATCHED = """
import io, json, sys
opened = []
def watch(event, given):
    if event == "open" and str(given[0]).endswith(".jpg"):
        opened.append(str(given[0]))
sys.addaudithook(watch)
import cli
try:
    cli.main()
except SystemExit as ended:
    heavy = sorted({"torch", "torchvision", "lightning", "sklearn"} & set(sys.modules))
    print(json.dumps({"code": ended.code, "images": opened, "heavy": heavy}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., Path], backbone_file: Path) -> Path:
    """``photos`` with two classes too small to be divided, ``many`` with a cache and a bundle, and files in the way."""
    folder = tmp_path_factory.mktemp("cheap")
    for label, count in {"ants": 8, "bees": 1, "wasps": 2}.items():
        for i in range(count):
            make_image(folder / f"photos/{label}/{i}.jpg", seed=i)
    for k, label in enumerate(("ants", "bees")):
        for i in range(8):
            make_image(folder / f"many/{label}/{i}.jpg", seed=10 * k + i)
            make_image(folder / f"others/{label}{label}/{i}.jpg", seed=10 * k + i)
    run_extract(ImageFolder(folder / "many"), Backbone(str(backbone_file)), folder / "many.cache", Options(quiet=True))
    classifiers.train(FeatureCache(folder / "many.cache"), folder / "a.head", make_head("logistic", C=1.0))
    (folder / "taken").mkdir()
    (folder / "taken/notes.txt").touch()
    (folder / "page.html").touch()
    job = f'data = "gone"\ncache = "c"\nbundle = "b"\n[backbone]\nname = "{backbone_file}"\n[train]\nhead = "knn"\nC = 1.0\n'
    (folder / "job.toml").write_text(job)
    return folder


@pytest.mark.parametrize(
    ("line", "code", "says", "not_yet"),
    [
        ("extract photos -m resnt18 -o c", 2, "no backbone 'resnt18'; did you mean 'resnet18'", "'bees' has 1"),
        ("extract photos -m resnet18 --weights V9 -o taken", 2, "--weights V9: resnet18 has", "not a penult cache"),
        ("extract photos -m resnet18 --preset V9 -o c", 2, "--preset V9", "'bees' has 1"),
        ("extract photos -m {net} -o taken", 73, "is not a penult cache", "'bees' has 1"),
        ("extract photos -m resnet18 --weights gone.pth -o c --views 0", 2, "--views is 0; expected 1 to 64", "gone.pth"),
        ("extract photos -m resnet18 -o c", 65, "class 'bees' has 1, class 'wasps' has 2 distinct", "weights"),
        ("extract gone -m resnet18 -o c --val-fraction 0.6 --test-fraction 0.6", 2, "leave nothing to train on", "gone"),
        ("export resnet18 --crop 64 --resize 32 -o page.html", 2, "--crop 64 is larger than --resize 32", "exists"),
        ("train gone.cache --head mlp --C 1 -o a.head", 2, "--C is a setting of the logistic head", "exists"),
        ("train gone.cache -o a.head", 73, "exists; choose another name", "gone.cache"),
        ("train many.cache --head ridge --few-shot 0 -o h", 2, "--few-shot is 0; expected 1 or more", "leak"),
        ("finetune photos -m resnt18 -o taken", 2, "did you mean 'resnet18'", "not a bundle"),
        ("finetune photos -m resnet18 -o taken", 73, "taken exists", "'bees' has 1"),
        ("finetune photos -m resnet18 --epochs 2 --warmup 2 -o h", 2, "--warmup is 2.0; expected less than the 2", "'bees'"),
        ("evaluate a.head gone --plot a.txt", 2, "a plot is written as", "gone"),
        ("evaluate a.head gone --min-map 0.5", 2, "--min-map is for multi-label, and this is single-label", "gone"),
        ("evaluate a.head others", 65, "label that the head was not trained on: 'antsants' (8), 'beesbees' (8)", "decod"),
        ("report a.head gone -o page.html", 73, "page.html exists", "gone"),
        ("report a.head gone -o no/page.html", 73, "there is no folder no", "gone"),
        ("compare a.head gone.head -o page.html", 73, "page.html exists", "gone.head"),
        ("predict a.head gone.jpg -b 0", 2, "--batch-size is 0; expected 1 to 4096", "gone.jpg"),
        ("sweep photos -m {net},resnt18 -o s", 2, "did you mean 'resnet18'", "'bees' has 1"),
        ("sweep gone -m {net} --head forest -o s", 2, '--head is "forest"; expected logistic', "gone"),
        ("compact many.cache --prune -o page.html", 73, "page.html exists", "rows removed"),
        ("run job.toml", 78, "train.C is a setting of the logistic head, and this is knn", "gone"),
    ],
)
def test_the_cheap_mistake_is_named_first(
    line: str, code: int, says: str, not_yet: str, place: Path, backbone_file: Path
) -> None:
    words = line.format(net=backbone_file).split()
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *words], cwd=place, capture_output=True, text=True, check=False, env=None
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"code": code, "images": [], "heavy": []}, done.stderr
    assert says in done.stderr
    assert not_yet not in done.stderr


# Runs a command for which importing some modules fails, as if they were not installed.
WITHOUT = """
import json, sys
names = set(json.loads(sys.argv.pop(1)))
class Missing:
    def find_spec(self, name, *_):
        if name in names:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Missing())
import cli
cli.main()
"""
TORCH = ("torch", "torchvision", "lightning")
PLOTS = ("scipy", "sklearn", "matplotlib", "jinja2")
LINEAR = ("linear_model", "model_selection", "decomposition", "manifold", "neighbors", "metrics")
OURS = ("extractor.backbones.export", "extractor.pipeline.run", "extractor.data.sources", "classifiers.reports")


@pytest.mark.parametrize(
    ("line", "without"),
    [
        ("info many.cache", (*TORCH, *PLOTS, *OURS, "onnx", "onnxruntime", "PIL", "pydantic", "classifiers.bundles")),
        ("predict a.head many/ants/0.jpg", (*TORCH, *PLOTS, *OURS, "rich", "classifiers.training", "classifiers.bundles.fuse")),
        ("train many.cache --head logistic -o b.head", (*TORCH, *(f"sklearn.{name}" for name in LINEAR), OURS[1])),
    ],
)
def test_quick_commands_do_without_what_takes_long_to_import(line: str, without: tuple[str, ...], place: Path) -> None:
    """Every one of these costs from 0.02 to 2 core-seconds; docs/benchmarks.md has what the commands cost."""
    arguments = [json.dumps(without), *line.split()]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], cwd=place, capture_output=True, text=True, check=False)
    assert (done.returncode, "No module" in done.stderr) == (0, False), done.stderr


@pytest.mark.skipif(nvidia_driver_present(), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize("command", ["extract", "finetune"])
def test_a_device_that_is_not_there_is_named_before_classes_that_are_too_small(command: str, place: Path) -> None:
    words = [command, "photos", "-m", "resnet18", "-o", "c", "--device", "cuda"]
    done = subprocess.run([sys.executable, "-c", WATCHED, *words], cwd=place, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout.splitlines()[-1]) == {"code": 69, "images": [], "heavy": []}, done.stderr
    assert "--device cuda: this machine has no NVIDIA driver" in done.stderr
