"""`penult run` as a scheduler calls it: what is done again, exit codes, the record, the structured log and the metrics."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from classifiers.bundles.bundle import Bundle
from classifiers.jobs import run
from classifiers.jobs.history import read_runs, run_cells, runs_file
from classifiers.jobs.job_file import read_job
from classifiers.jobs.run import preview_job, run_job
from extractor.pipeline.settings import Options
from extractor.pixels.augment import STANDARD, Augmentation
from extractor.prometheus import Metrics
from extractor.run_log import JsonLog, observed
from store.errors import BadDataError, BudgetExceededError, InputMissingError, JobFileError, LockedError, StorageError
from store.format.lock import file_lock

REPO = Path(__file__).resolve().parents[3]
JOB = """
data = "photos"
cache = "out.cache"
bundle = "out.head"
[backbone]
name = "{backbone}"
[train]
head = "logistic"
C = {C}
[gate]
min_accuracy = {gate}
"""

WHOLE = JOB.format(backbone="resnet18", C=1.0, gate=0.5)


def paint(folder: Path, label: str, tint: tuple[int, int, int], count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    (folder / label).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.clip(np.array(tint) + rng.normal(0, 60, (40, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / label / f"{seed}-{i:03d}.png")


@pytest.fixture
def job(tmp_path: Path, backbone_file: Path) -> Callable[..., Path]:
    """``job(gate=0.5, C=1.0)`` writes the job file; 15 red and 15 blue pictures are there."""
    for seed, (label, tint) in enumerate({"blue": (40, 60, 200), "red": (200, 50, 40)}.items()):
        paint(tmp_path / "photos", label, tint, 15, seed)

    def write(gate: float | str = 0.5, C: float = 1.0, extra: str = "") -> Path:
        path = tmp_path / "nightly.toml"
        path.write_text(JOB.format(backbone=backbone_file, gate=gate, C=C) + extra)
        return path

    return write


def metrics(path: Path) -> dict[str, float]:
    """Samples by name, with labels as in the text."""
    families = text_string_to_metric_families(path.read_text())
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_nothing_is_done_again_unless_it_changed(job: Callable[..., Path], tmp_path: Path) -> None:
    first = run_job(job())
    assert (first.exit_code, first.trained, first.extract.computed) == (0, True, 30)
    made = (tmp_path / "out.head/head.json").stat().st_mtime_ns
    second = run_job(job())
    assert (second.trained, second.extract.computed, second.extract.inference_calls) == (False, 0, 0)
    assert second.evaluation == first.evaluation
    assert (tmp_path / "out.head/head.json").stat().st_mtime_ns == made
    assert run_job(job(C=0.5)).trained  # other settings
    paint(tmp_path / "photos", "red", (200, 50, 40), 1, seed=9)
    added = run_job(job(C=0.5))
    assert (added.trained, added.extract.computed) == (True, 1)
    moved = tmp_path / "photos/red/9-000.png"
    moved.rename(tmp_path / "photos/blue/9-000.png")  # the same image under another label
    (tmp_path / "photos/empty").mkdir()
    shutil.copy(tmp_path / "photos/red/1-000.png", tmp_path / "photos/blue/again.png")
    relabelled = run_job(job(C=0.5), record=(record := {}))
    assert (relabelled.trained, relabelled.extract.computed) == (True, 0)
    assert relabelled.extract.changes["label"] == 2  # the moved one, and the copy
    assert f"the folder empty in {tmp_path / 'photos'} is empty" in record["warnings"]
    assert any("have more than one label" in text for text in record["warnings"]), "of the training, too"


def test_a_job_that_wants_no_thumbnails_trains_again_without(job: Callable[..., Path], tmp_path: Path) -> None:
    for seed, label in enumerate(("blue", "red"), 7):  # of one tint: there are mistakes to show
        paint(tmp_path / "photos", label, (128, 128, 128), 15, seed)
    assert run_job(job(gate=0)).trained
    page = tmp_path / "out.head" / "report.html"
    assert "data:image/jpeg" in page.read_text()
    path = job(gate=0)
    path.write_text(path.read_text().replace("[train]", "[train]\nthumbnails = false"))
    assert run_job(path).trained
    assert "data:image/jpeg" not in page.read_text()
    assert not run_job(path).trained


def test_a_job_may_have_views_and_average_over_them(job: Callable[..., Path], tmp_path: Path) -> None:
    def written(extract: str, train: str) -> Path:
        path = job()
        path.write_text(path.read_text().replace("[train]", f"[train]\n{train}") + f"\n[extract]\n{extract}\n")
        return path

    assert run_job(written("views = 2", "average_views = true")).trained
    views = Bundle.load(tmp_path / "out.head").views
    assert views is not None
    assert (views.count, views.augmentation) == (2, STANDARD)
    assert not run_job(written("views = 2", "average_views = true")).trained
    assert run_job(written("views = 2", "")).trained, "another head, on the same features"
    for extract, train, word in (
        ("", "average_views = true", "extract.views"),
        ('augment = "augmix"', "", "of 2 or more"),
    ):
        with pytest.raises(JobFileError, match=word):
            run_job(written(extract, train))


def test_a_job_is_told_what_the_commands_are_told(job: Callable[..., Path], tmp_path: Path) -> None:
    """Layers, a limit, augmentation, a learning curve and a split of the head's own; and nothing is done twice."""
    told = '[extract]\nlimit = 28\nviews = 2\naugment = "none"\nflip = "both"\nrotation = 10\nbatch_size = "auto"\n'
    own = "average_views = true\nfew_shot = [2]\nrepeats = 2\nval_fraction = 0\nseed = 3"
    path = job(gate=0.0, extra=told)
    text = path.read_text().replace("[train]", f"[train]\n{own}")
    network = 'name = "squeezenet1_1"\nweights = "random:0"\nresize = 40\ncrop = 32\nlayers = ["features.12", "features.3"]'
    text = re.sub('name = ".*"', network, text).replace("[train]", '[train]\nlayer = "features.3"')
    path.write_text(text)
    first = run_job(path)
    assert (first.extract.inputs, first.trained, first.evaluation.n) == (28, True, 6)
    bundle = Bundle.load(tmp_path / "out.head")
    assert bundle.views is not None
    assert bundle.views.augmentation == Augmentation(area=None, flip=0.5, vertical_flip=0.5, rotation=10.0)
    assert bundle.few_shot is not None
    assert [point["shots"] for point in bundle.few_shot] == [2]
    assert bundle.split["override"]
    again = run_job(path)
    assert (again.extract.computed, again.trained) == (0, False)
    path.write_text(path.read_text().replace("few_shot = [2]", "few_shot = [3]"))
    assert run_job(path).trained, "another curve"


def test_a_damaged_bundle_is_made_again(job: Callable[..., Path], tmp_path: Path) -> None:
    run_job(job())
    (tmp_path / "out.head/head.onnx").write_bytes(b"")
    assert run_job(job()).trained
    Bundle.load(tmp_path / "out.head")


def test_every_ending_is_recorded(job: Callable[..., Path], tmp_path: Path) -> None:
    run_job(job())
    (tmp_path / "photos/red/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert run_job(job()).exit_code == 3
    for i in range(15):  # blue pictures under red, too: nobody can be right about all of them
        source = tmp_path / f"photos/blue/0-{i:03d}.png"
        Image.open(source).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / f"photos/red/x{i}.png")
    served = (tmp_path / "out.head/head.json").read_bytes()
    missed = run_job(job(gate=1.0))
    assert missed.exit_code == 65
    assert missed.gate_missed is not None
    assert re.match(
        r"gate not met: accuracy .* is below gate.min_accuracy 1.0; the new head is kept as out.head.rejected",
        missed.gate_missed,
    )
    assert (tmp_path / "out.head/head.json").read_bytes() == served, (
        "a head that misses the gate took the place of one that met it"
    )
    assert Bundle.load(tmp_path / "out.head.rejected").metrics is not None
    assert not list(tmp_path.glob(".out.head*"))
    with pytest.raises(BudgetExceededError):
        run_job(job(extra='[extract]\nmax_failures = "0"\n'))
    records = read_runs(job())
    assert [record["exit_code"] for record in records] == [0, 3, 65, 65]
    assert "gate not met" in records[2]["error"]
    assert records[2]["evaluation"]["n"] > 0
    assert records[3]["extract"]["failed"] == 1
    assert all(record["versions"]["torch"] and record["seconds"] > 0 for record in records)
    runs_file(job()).write_bytes(runs_file(job()).read_bytes() + b'{"cut by a cra')
    assert len(read_runs(job())) == 4
    with pytest.raises(InputMissingError, match="no runs"):
        read_runs(tmp_path / "other.toml")


def test_overlapping_starts_end_with_75(job: Callable[..., Path], tmp_path: Path) -> None:
    path = job()
    command = [sys.executable, REPO / "cli.py", "run", path]
    with file_lock(tmp_path / ".nightly.toml.lock", what="the job"):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
        with pytest.raises(LockedError):  # also within one process
            run_job(path)
    assert done.returncode == 75
    assert "in use by another run" in done.stderr
    assert not runs_file(path).exists()
    assert run_job(path).exit_code == 0


def test_a_dry_run_writes_nothing(job: Callable[..., Path], tmp_path: Path) -> None:
    path = job()
    before = sorted(tmp_path.rglob("*"))
    labels = {"labels": {"blue": 15, "red": 15}, "unlabelled": 0, "subfolders": {}, "warnings": []}
    assert preview_job(path) == {
        "extract": {"inputs": 30, "unchanged": 0, "to_read": 30, **labels},
        "train": "yes, if features, labels or settings changed",
    }
    assert sorted(tmp_path.rglob("*")) == before
    run_job(path)
    assert preview_job(path) == {"extract": {"inputs": 30, "unchanged": 30, "to_read": 0, **labels}, "train": "unchanged"}
    (tmp_path / "photos/red/1-000.png").unlink()
    paint(tmp_path / "photos", "red", (200, 50, 40), 2, seed=9)
    labels = {"labels": {"blue": 15, "red": 16}, "unlabelled": 0, "subfolders": {}, "warnings": []}
    assert preview_job(path)["extract"] == {"inputs": 31, "unchanged": 29, "to_read": 2, **labels}


def test_the_structured_log_ends_with_a_summary_and_metrics_parse(job: Callable[..., Path], tmp_path: Path) -> None:
    log, prom = tmp_path / "log.jsonl", tmp_path / "penult.prom"
    path = job()
    for gate in (0.0, 1.0):
        if gate:
            (tmp_path / "photos/red/broken.png").write_bytes(b"")
            path = job(extra='[extract]\nmax_failures = "0"\n')
        with suppress(BudgetExceededError), observed(log_json=log, metrics=prom) as seen:
            run_job(path, record=seen)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    summaries = [line for line in lines if line.get("event") == "summary"]
    assert [line["exit_code"] for line in summaries] == [0, 65]
    assert lines[-1] == summaries[-1]
    assert [line["computed"] for line in lines if line.get("event") == "shard"] == [30, 0]
    assert summaries[0]["evaluation"]["n"] == 6
    assert summaries[0]["train"]["seconds"].keys() > {"head", "report", "total"}
    found = metrics(prom)
    assert found["penult_exit_code"] == 65
    assert (found["penult_rows[ok]"], found["penult_rows[failed]"]) == (30, 1)
    assert found["penult_cache_bytes"] > 30 * 512 * 2
    assert 0 < found["penult_last_success_timestamp_seconds"] <= found["penult_heartbeat_timestamp_seconds"]
    assert {name for name in found if name.startswith("penult_stage_seconds")} >= {"penult_stage_seconds[total]"}
    assert "photos" not in prom.read_text()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.EIO, "Input/output error", "x.jpg"), 74, "x.jpg: Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied", "c"), 73, "c: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted by signal 2; run the same command again to start over"),
        (SystemExit(143), 143, "interrupted by signal 15; run the same command again to start over"),
        (ZeroDivisionError("0"), 70, "ZeroDivisionError: 0"),
    ],
)
def test_a_run_is_recorded_with_the_code_it_ends_with(
    error: BaseException,
    code: int,
    text: str,
    tmp_path: Path,
    job: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    penult: Callable[..., tuple[int, str, str]],
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(run, "run_extract", fails)
    path = job()
    log, prom = tmp_path / "log.jsonl", tmp_path / "run.prom"
    ended = penult("run", path, "--log-json", log, "--metrics", prom)[0]
    (record,) = read_runs(path)
    summary = json.loads(log.read_text().splitlines()[-1])
    assert (ended, record["exit_code"], summary["exit_code"], metrics(prom)["penult_exit_code"]) == (code,) * 4
    assert record["error"] == summary["error"] == text


def test_a_log_on_a_full_disk_does_not_hide_how_the_run_ends(
    job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, penult: Callable[..., tuple[int, str, str]]
) -> None:
    def fails(*_: object, **__: object) -> None:
        message = "the reason"
        raise BadDataError(message)

    monkeypatch.setattr(run, "_run", fails)
    code, _, err = penult("run", job(), "--log-json", "/dev/full")
    assert (code, "error: the reason" in err) == (65, True)
    assert "warning: cannot write /dev/full: No space left on device; it ends here" in err


def test_a_log_that_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        JsonLog(tmp_path / "no/such/folder/log.jsonl")
    Metrics(tmp_path / "no/such/folder/m.prom")  # only warns: a run does not die of its metrics


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            'data = "x"\ncache = "c"\nbundle = "b"\n[backbone]\nnam = "resnet18"\n',
            "unknown key 'backbone.nam'; did you mean 'name'?",
        ),
        ('data = "x"\ndata = "y"\n', "is not TOML"),
        ('data = "x"\ncache = "c"\nbundle = "b"\n', "backbone.name is missing"),
        ('data = 3\ncache = "c"\nbundle = "b"\n[backbone]\nname = "resnet18"\n', "data is 3; expected text"),
        (JOB.format(backbone="resnet18", C=1.0, gate='"0.9"'), """gate.min_accuracy is "0.9"; expected a number"""),
        (JOB.format(backbone="resnet18", C=1.0, gate=1.5), "gate.min_accuracy is 1.5; expected 0 to 1"),
        (JOB.format(backbone="resnet18", C="inf", gate=0.5), "train.C is Infinity; expected a finite number"),
        (WHOLE + "[extract]\nworkers = 0\n", "extract.workers is 0; expected 1 to 256"),
        (WHOLE + "[extract]\nbatch_size = 100000\n", "extract.batch_size is 100000; expected 1 to 4096"),
        (WHOLE + "[extract]\nbatch_size = 8.5\n", "extract.batch_size is 8.5; expected a whole number"),
        (WHOLE + "[extract]\nstorage = 'half'\n", "extract.storage is \"half\"; expected 'auto' or 'float32'"),
        (WHOLE + "[extract]\nmax_failures = -1\n", "expected a number such as 10, or a share such as"),
        (WHOLE + "[extract]\nmax_failures = true\n", "expected a number such as 10, or a share such as"),
        (WHOLE + "[extract]\nretry_failed = 'yes'\n", """extract.retry_failed is "yes"; expected true or false"""),
        (
            JOB.format(backbone="resnet18", C='1.0\nmax_memory = "4 QB"', gate=0.5),
            """train.max_memory is "4 QB"; expected a size such as 4GB""",
        ),
        (WHOLE + "extract = 3\n", "'gate.extract'"),
        ("extract = 3\n" + WHOLE, "extract is 3; expected a section of keys"),
        (JOB.format(backbone="resnet18", C=1.0, gate=0.5) + "[extrat]\n", "unknown key 'extrat'; did you mean 'extract'?"),
    ],
)
def test_wrong_job_files_name_the_key(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(JobFileError) as caught:
        read_job(tmp_path / "job.toml")
    assert caught.value.exit_code == 78
    assert says in str(caught.value)


def test_one_mean_stands_for_three_as_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").touch()
    stated = WHOLE.replace("resnet18", "net.onnx").replace("[backbone]\n", "[backbone]\nmean = 0.5\nstd = [0.1, 0.2, 0.3]\n")
    (tmp_path / "job.toml").write_text(stated)
    job = read_job(tmp_path / "job.toml")
    assert (job.extract.mean, job.extract.std) == ((0.5,), (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"a": 1}',
        '"x"',
        '{"started": "s", "exit_code": "0", "seconds": 1}',
        '{"started": "s", "exit_code": 0, "seconds": 1, "evaluation": {"interval": [1]}}',
        '{"started": "s", "exit_code": 0, "sec',
        "[" * 100_000,
    ],
)
def test_a_line_of_the_history_that_is_no_record_is_left_out(tmp_path: Path, line: str) -> None:
    record = {"started": "2026-01-01", "exit_code": 65, "seconds": 1.5}
    runs_file(tmp_path / "j.toml").write_text(f"{line}\n{json.dumps(record)}\n")
    assert read_runs(tmp_path / "j.toml") == [record]
    assert run_cells(record)[:3] == ("2026-01-01", "65", "1.5")


@pytest.mark.parametrize(("value", "budget"), [("3", 3), ('"3"', 3), ('"1%"', 10), ('"0.5%"', 5)])
def test_a_budget_is_a_number_or_a_share(tmp_path: Path, value: str, budget: int) -> None:
    (tmp_path / "job.toml").write_text(WHOLE + f"[extract]\nmax_failures = {value}\n")
    assert Options(max_failures=read_job(tmp_path / "job.toml").extract.max_failures).budget(1000) == budget


def test_memory_has_a_unit(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB.format(backbone="resnet18", C='1.0\nmax_memory = "4GB"', gate=0.5))
    assert read_job(tmp_path / "job.toml").train.max_memory == 4 * 10**9
