"""The faces of the three packages: cheap to import, every public name has an example that runs, and objects show themselves."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import classifiers
import extractor
import store
from tests.conftest import MakeDataset
from tests.test_deletion import write_network

REPO = Path(__file__).resolve().parents[1]
FACES = {face.__name__: face for face in (store, extractor, classifiers)}
MODULES = [path for face in FACES for path in sorted((REPO / face).rglob("*.py")) if ">>> " in path.read_text()]
EXAMPLES = [".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
NAMES = [f"{face}.{name}" for face, module in FACES.items() for name in module.__all__]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples use: 30 pictures of two kinds, a network, a cache of the one by the other, and two bundles."""
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    for label, colour in (("cat", (200, 120, 40)), ("dog", (40, 120, 200))):
        (folder / "pets" / label).mkdir(parents=True)
        for i in range(15):
            own = np.add(colour, rng.normal(0, 20, 3))  # no two are near copies
            pixels = np.clip(rng.normal(own, 60, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "pets" / label / f"{i:03d}.png")
    write_network(folder / "tiny.onnx")
    quiet = extractor.Options(device="cpu", quiet=True)
    cache = extractor.extract(folder / "pets", str(folder / "tiny.onnx"), folder / "pets.cache", quiet)
    for head in ("logistic", "centroid"):
        classifiers.train(cache, folder / f"{head}.head", head, classifiers.TrainOptions(thumbnails=False))
    (folder / "logistic.head").rename(folder / "pets.head")
    job = 'data = "pets"\ncache = "job.cache"\nbundle = "job.head"\n[backbone]\nname = "tiny.onnx"\n'
    (folder / "nightly.toml").write_text(job)
    return folder


@pytest.fixture
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_in_a_docstring_runs(name: str) -> None:
    module = importlib.import_module(name)
    examples = [each for each in doctest.DocTestFinder().find(module, name) if each.examples]
    assert examples
    problems: list[str] = []
    for example in examples:
        own = example.name.rpartition(".")[2]
        example.globs = {own: getattr(module, own, None)}  # all else an example imports itself, as its reader must
        doctest.DocTestRunner().run(example, out=problems.append)
    assert problems == []


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example(name: str) -> None:
    face, _, attribute = name.partition(".")
    assert ">>> " in (inspect.getdoc(getattr(FACES[face], attribute)) or "")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "store.PenultError"])
def test_public_names_say_what_they_take(name: str) -> None:
    face, _, attribute = name.partition(".")
    public = getattr(FACES[face], attribute)
    assert public.__name__ == attribute
    assert public.__module__.startswith(f"{face}.")
    signature = inspect.signature(public)
    assert all(each.annotation is not each.empty for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD)


def test_importing_the_faces_imports_nothing_heavy() -> None:
    heavy = {"numpy", "torch", "pydantic", "h5py", "sklearn", "click"}
    code = f"import sys, store, extractor, classifiers; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("face", FACES)
def test_a_name_that_is_not_there_is_an_attribute_error(face: str) -> None:
    module = importlib.import_module(face)
    with pytest.raises(AttributeError, match=f"module '{face}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018
    assert dir(module) == module.__all__


@pytest.mark.usefixtures("inside")
def test_objects_show_themselves_in_a_notebook() -> None:
    cache = store.FeatureCache("pets.cache")
    bundle = classifiers.Bundle.load("pets.head")
    evaluation, _ = classifiers.evaluate_bundle(bundle, cache)
    comparison = classifiers.compare(["pets.head", "centroid.head"])
    shown = [each._repr_html_() for each in (cache, cache.subset("train"), bundle, evaluation, comparison)]
    assert all(html.startswith("<b>") and html.endswith("</table>") for html in shown)
    assert "<tr><td>cat</td><td>9</td><td>3</td><td>3</td></tr>" in shown[0]
    assert "<tr><td>dog</td><td>9</td></tr>" in shown[1]
    for html in shown[2:4]:
        assert "<tr><td>accuracy</td><td>1.0000</td><td>0.6097 to 1.0000</td></tr>" in html
    assert "<td>baseline</td>" in shown[4]


def test_what_is_shown_is_escaped(tmp_path: Path, dataset: MakeDataset) -> None:
    write_network(tmp_path / "tiny.onnx")
    dataset(tmp_path / "pets", {"<ants>": 6, "bees & wasps": 6})
    options = extractor.Options(device="cpu", quiet=True, val_fraction=0, test_fraction=0)
    html = extractor.extract(tmp_path / "pets", str(tmp_path / "tiny.onnx"), tmp_path / "c", options)._repr_html_()
    assert "<td>&lt;ants&gt;</td>" in html
    assert "bees &amp; wasps" in html
