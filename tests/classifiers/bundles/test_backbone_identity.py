"""Whatever combines a head, or features, with a network has the network that made the features, or says that it has not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import classifiers
from classifiers.bundles.bundle import Bundle, save_bundle
from classifiers.bundles.fuse import fuse, selftest
from classifiers.bundles.fused import Fused
from classifiers.bundles.predictor import Predictor
from classifiers.finetuning.finetune import finetune
from classifiers.finetuning.settings import FineTuneSettings
from classifiers.heads.registry import make_head
from classifiers.reports.bundle_page import report_again
from classifiers.reports.settings import ReportSettings
from classifiers.training.settings import TrainOptions
from extractor.backbones.registry import Backbone
from extractor.data.folders import ImageFolder
from extractor.graphs import onnx_file
from extractor.graphs.backbone_facts import read_facts
from extractor.pipeline.run import run_extract
from extractor.pipeline.settings import Options
from store.cache import FeatureCache
from store.compact import write_compact
from store.errors import BadDataError, CorruptCacheError, InputMissingError, LockedError
from store.verify import verify_cache
from tests.conftest import other_network, seal
from tests.test_deletion import write_network

REPO = Path(__file__).resolve().parents[3]
Penult = Callable[..., tuple[int, str, str]]

FLIPS = 50
MOMENTS = 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, dataset: Any) -> Path:
    """A folder with 30 pictures, two networks, the cache of each, and the bundle of the first."""
    folder = tmp_path_factory.mktemp("identity")
    dataset(folder / "photos", {"ants": 15, "bees": 15})
    write_network(folder / "a.onnx")
    other_network(folder / "a.onnx", folder / "b.onnx")
    for name in ("a", "b"):
        extract(folder / "photos", folder / f"{name}.onnx", folder / f"{name}.cache")
    classifiers.train(
        FeatureCache(folder / "a.cache"), folder / "a.head", make_head("logistic", C=1.0), TrainOptions(thumbnails=False)
    )
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "a.cache", tmp_path / "a.cache"))


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "a.head", tmp_path / "a.head"))


def extract(photos: Path, network: Path, cache: Path, **options: Any) -> None:
    run_extract(ImageFolder(photos), Backbone(str(network)), cache, Options(quiet=True, **options))


def train(cache: Path, out: Path) -> Bundle:
    return classifiers.train(FeatureCache(cache), out, make_head("logistic", C=1.0), TrainOptions(thumbnails=False))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def changes(file: Path, other: Path) -> Iterator[bytes]:
    """The file with one bit flipped, at random places, and another file in its place."""
    data, rng = file.read_bytes(), np.random.default_rng(0)
    for place, bit in zip(rng.integers(len(data), size=FLIPS), rng.integers(8, size=FLIPS), strict=True):
        yield data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]
    yield other.read_bytes()


def test_another_network_in_a_cache_is_in_no_bundle(made: Path, cache: Path, tmp_path: Path) -> None:
    network: dict[str, Any] = {"backbone": "squeezenet1_1", "weights": "random:0", "resize": 72, "crop": 64}
    settings = FineTuneSettings(**network, init_head=made / "a.head")
    uses: list[Callable[[], object]] = [
        lambda: train(cache, tmp_path / "new.head"),
        lambda: write_compact(FeatureCache(cache), tmp_path / "new.h5"),
        lambda: finetune(FeatureCache(cache), tmp_path / "new.head", settings),
    ]
    for data in changes(cache / "backbone.onnx", made / "b.cache/backbone.onnx"):
        (cache / "backbone.onnx").write_bytes(data)
        for use in uses:
            with pytest.raises(CorruptCacheError, match=r"backbone\.onnx: this is not the backbone that made the features"):
                use()
    assert [finding.file for finding in verify_cache(cache)] == ["backbone.onnx"]
    (cache / "backbone.onnx").unlink()
    for use in uses:
        with pytest.raises(InputMissingError, match=r"backbone\.onnx is missing; the same extract command makes it again"):
            use()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("new", ".new"))]
    extract(made / "photos", made / "a.onnx", cache)
    train(cache, tmp_path / "new.head")
    assert verify_cache(cache) == []


def test_another_network_in_a_bundle_judges_nothing(made: Path, bundle: Path, tmp_path: Path) -> None:
    picture = made / "photos/ants/000.jpg"
    uses: list[Callable[[], object]] = [
        lambda: list(Predictor.load(bundle).predict([picture])),
        lambda: fuse(Bundle.load(bundle), tmp_path / "a.onnx"),
        lambda: selftest(bundle),
    ]
    saved = (bundle / "backbone.onnx").read_bytes()
    for data in changes(bundle / "backbone.onnx", made / "b.cache/backbone.onnx"):
        (bundle / "backbone.onnx").write_bytes(data)
        for use in uses:
            with pytest.raises(BadDataError, match=r"backbone\.onnx is not the file that was saved"):
                use()
    # as it was made before, when the digest of whatever lay in the cache was recorded as right
    facts = json.loads((bundle / "head.json").read_text())
    facts["files"]["backbone.onnx"] = digest(made / "b.cache/backbone.onnx")
    (bundle / "head.json").write_text(json.dumps(facts))
    seal(bundle)
    for use in uses:
        with pytest.raises(BadDataError, match=r"backbone\.onnx and the head of a\.head do not go together.*weights: "):
            use()
    assert not (tmp_path / "a.onnx").exists()
    (bundle / "backbone.onnx").write_bytes(saved)
    assert saved == (made / "a.cache/backbone.onnx").read_bytes()


def test_another_networks_head_counts_no_decisions(
    made: Path, tmp_path: Path, penult: Callable[..., tuple[int, str, str]]
) -> None:
    write_compact(FeatureCache(made / "b.cache"), tmp_path / "golden.h5")
    for command in (
        ("diff", made / "b.cache", made / "a.cache"),
        ("check", made / "a.cache", "--against", tmp_path / "golden.h5"),
    ):
        code, said, err = penult(*command, "--head", made / "a.head")
        assert (code, said) == (65, "")
        assert "do not go together. They differ in weights: " in err
    assert penult("diff", made / "a.cache", made / "b.cache", "--head", made / "a.head")[0] == 0


def test_files_replaced_after_they_were_looked_at(made: Path, bundle: Path, tmp_path: Path) -> None:
    """A bundle or a fused file is replaced between its digest and its session."""
    picture = made / "photos/ants/000.jpg"
    predictor = Predictor.load(bundle)
    shutil.copyfile(made / "b.cache/backbone.onnx", bundle / "backbone.onnx")
    with pytest.raises(BadDataError, match="do not go together"):
        list(predictor.predict([picture]))
    shutil.copyfile(made / "a.cache/backbone.onnx", bundle / "backbone.onnx")
    loaded = Bundle.load(bundle)
    classifiers.train(
        FeatureCache(made / "b.cache"), tmp_path / "b.head", make_head("centroid"), TrainOptions(thumbnails=False)
    )
    for name in ("head.onnx", "novelty.h5"):
        shutil.copyfile(tmp_path / "b.head" / name, bundle / name)
    with pytest.raises(BadDataError, match=r"head\.onnx is not the file that was saved"):
        Predictor.of(loaded)
    with pytest.raises(BadDataError, match=r"novelty\.h5 is not the file that was saved"):
        loaded.novelty()
    fuse(Bundle.load(made / "a.head"), tmp_path / "a.onnx")
    predictor = Predictor.fused(tmp_path / "a.onnx", Fused.load(tmp_path / "a.onnx"))
    fuse(Bundle.load(tmp_path / "b.head"), tmp_path / "a.onnx", overwrite=True)
    with pytest.raises(BadDataError, match="was replaced while it was opened"):
        list(predictor.predict([picture]))


def test_a_network_with_its_weights_beside_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnx_file, "MAX_INLINE", 1000)
    cache = tmp_path / "large.cache"
    extract(made / "photos", made / "a.onnx", cache)
    (data,) = cache.glob("backbone-*.data")
    saved = train(cache, tmp_path / "large.head")
    assert saved.files[data.name] == digest(data)
    whole = data.read_bytes()
    data.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    with pytest.raises(CorruptCacheError, match="this is not the backbone that made the features"):
        train(cache, tmp_path / "new.head")
    data.unlink()
    with pytest.raises(InputMissingError, match="cannot read"):
        train(cache, tmp_path / "new.head")


def test_what_is_saved_gives_the_features_of_its_fingerprint(made: Path, tmp_path: Path) -> None:
    """Also where the pair was made by hand, with all digests right."""
    bundle = replace(Bundle.load(made / "a.head"), path=tmp_path / "x.head")
    head, other = (made / "a.head/head.onnx").read_bytes(), made / "b.cache/backbone.onnx"
    with pytest.raises(BadDataError, match=r"its backbone and x\.head do not go together.*weights: "):
        save_bundle(bundle, backbone=other, head=head, predictions=None, fitted=[], page="")
    assert list(tmp_path.iterdir()) == []
    assert read_facts(made / "a.onnx").weights_sha256 == read_facts(made / "b.onnx").weights_sha256, "which is why files count"


def replaced(old: Path, new: Path) -> None:
    """Put a file in the place of another at once."""
    copy = old.with_name("copy")
    shutil.copyfile(new, copy)
    copy.replace(old)


def test_a_compact_file_replaced_while_it_is_open(made: Path, tmp_path: Path) -> None:
    """By that of another network, or of the same with other images: the rows lie elsewhere, and the backbone is the same."""
    fewer = Path(shutil.copytree(made / "photos", tmp_path / "photos"))
    for path in sorted(fewer.rglob("*.jpg"))[:4]:
        path.unlink()
    extract(fewer, made / "a.onnx", tmp_path / "fewer.cache")
    for name, cache in (("a", made / "a.cache"), ("b", made / "b.cache"), ("fewer", tmp_path / "fewer.cache")):
        write_compact(FeatureCache(cache), tmp_path / f"{name}.h5")
    for other in ("b", "fewer"):
        file = tmp_path / "x.h5"
        shutil.copyfile(tmp_path / "a.h5", file)
        opened = FeatureCache(file)
        keys = [row.sha256 for row in opened.rows()]
        before = opened.features(keys)
        later = opened.lazy(keys)
        replaced(file, tmp_path / f"{other}.h5")
        with pytest.raises(LockedError, match="was replaced, by another run while it was read"):
            opened.features(keys)
        with pytest.raises(LockedError):
            np.asarray(later)
        with pytest.raises(LockedError):
            write_compact(opened, tmp_path / "new.h5")
        assert before.tobytes() == FeatureCache(tmp_path / "a.h5").features(keys).tobytes()
    assert not (tmp_path / "new.h5").exists()


def test_the_same_network_with_other_images(made: Path, cache: Path, tmp_path: Path) -> None:
    """cache.json is the same; the shards, and the table, are not."""
    opened = FeatureCache(cache)
    fewer = Path(shutil.copytree(made / "photos", tmp_path / "photos"))
    sorted(fewer.rglob("*.jpg"))[0].unlink()
    extract(fewer, made / "a.onnx", cache, overwrite=True)
    with pytest.raises(LockedError):
        classifiers.train(opened, tmp_path / "new.head", make_head("centroid"), TrainOptions(thumbnails=False))


def test_a_page_is_of_one_cache(made: Path, bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def counted(path: Path, layer: str | None = None) -> FeatureCache:
        opened.append(path)
        return FeatureCache(path, layer)

    monkeypatch.setattr("classifiers.reports.bundle_page.FeatureCache", counted)
    assert report_again(Bundle.load(bundle), cache, ReportSettings(thumbnails=False))
    assert opened == [cache], "neighbours are looked for among the features that the scores are of"


def test_what_is_not_finished_is_no_dataset(made: Path, cache: Path, bundle: Path, penult: Penult) -> None:
    (cache / "samples.h5").unlink()
    network = ("-m", "squeezenet1_1", "--weights", "random:0", "--crop", "64", "--resize", "72")
    for command in (("evaluate", bundle, cache), ("finetune", cache, *network, "-o", cache.with_name("t")), ("info", cache)):
        code, said, err = penult(*command)
        assert (code, said) == (66, "")
        assert "is an unfinished cache; run the same extract command again to continue it" in err
    with writer_lock_of_another(cache):
        for command in (("evaluate", bundle, cache), ("info", cache)):
            assert penult(*command)[0] == 75


@contextmanager
def writer_lock_of_another(cache: Path) -> Iterator[None]:
    """The lock of a cache, held by another process."""
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(cache / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate()


class Overwriter:
    """Another process that overwrites a cache with the other network, and stops in the middle where it is told to."""

    CODE = """
import json, sys
stop, seen, cache = None, 0, sys.argv[2]
def hook(event, arguments):
    global seen, stop
    path = str(arguments[0]) if event in ("os.rename", "os.remove") and stop is not None else ""
    if path.startswith(cache) and not path.endswith("penult-lock"):
        seen += 1
        if seen == stop:
            stop = None
            print("paused", flush=True)
            sys.stdin.readline()
sys.addaudithook(hook)
sys.path[:] = json.loads(sys.argv[1])
from pathlib import Path
from extractor.backbones.registry import Backbone
from extractor.pipeline.settings import Options
from extractor.pipeline.run import run_extract
from extractor.data.folders import ImageFolder
for line in sys.stdin:
    photos, network, at = json.loads(line)
    seen, stop = 0, at
    run_extract(ImageFolder(Path(photos)), Backbone(network), Path(cache), Options(quiet=True, overwrite=True))
    print("done", flush=True)
"""

    def __init__(self, cache: Path, photos: Path) -> None:
        self._photos = photos
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, json.dumps(sys.path), str(cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def begin(self, network: Path, at: int) -> str:
        """Overwrite; return at the at-th rename or removal, or when it is over."""
        return self._say(json.dumps([str(self._photos), str(network), at]))

    def finish(self) -> str:
        return self._say("")

    def _say(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def overwriter(made: Path, cache: Path) -> Iterator[Overwriter]:
    other = Overwriter(cache, made / "photos")
    yield other
    other.close()


def belongs_together(result: Path, networks: list[Path]) -> None:
    """The features or the head, and the network beside them, are of one network."""
    if result.suffix == ".h5":
        cache = FeatureCache(result)
        data, facts = cache.read_backbone(), cache.fingerprint.fields
    else:
        data, facts = (result / "backbone.onnx").read_bytes(), Bundle.load(result).fingerprint.fields
    assert facts["weights"] == read_facts(result, data).weights_sha256
    assert facts["weights"] in {digest(network) for network in networks}


def test_beside_an_extract_that_replaces_everything(
    made: Path, cache: Path, tmp_path: Path, overwriter: Overwriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` and `compact` while another process replaces the cache: the network of the features they read, or 75.

    Half of the moments are in the middle of the other's work, at one of its renames and removals; the others in the middle of
    ours, at one of our own reads, and then all of the other's work is done at once.
    """
    networks, rng = [made / "a.onnx", made / "b.onnx"], np.random.default_rng(0)
    results = tmp_path / "new.head", tmp_path / "new.h5"
    refused = finished = left = 0
    real = Path.open

    def opened(self: Path, *arguments: Any, **options: Any) -> Any:
        nonlocal left
        if cache in self.parents and left:
            left -= 1
            if not left:
                assert overwriter.begin(network, 0) == "done"
        return real(self, *arguments, **options)

    def use(number: int, cache: FeatureCache) -> None:
        if number % 4 < 2:
            classifiers.train(cache, results[0], make_head("centroid"), TrainOptions(thumbnails=False), overwrite=True)
        else:
            write_compact(cache, results[1], overwrite=True)

    monkeypatch.setattr(Path, "open", opened)
    for moment in range(MOMENTS):
        network = networks[(moment + 1) % 2]
        before = FeatureCache(cache)
        paused = moment < MOMENTS // 2 and overwriter.begin(network, int(rng.integers(1, 14))) == "paused"
        left = 0 if moment < MOMENTS // 2 else int(rng.integers(1, 12))
        for attempt in (lambda before=before: before, lambda: FeatureCache(cache)):
            try:
                use(moment, attempt())
                finished += 1
            except LockedError:
                refused += 1
            left = 0
        if paused:
            assert overwriter.finish() == "done"
        for result in filter(Path.exists, results):
            belongs_together(result, networks)
    assert refused >= MOMENTS // 2
    assert finished >= MOMENTS // 4
