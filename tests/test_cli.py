"""The command line as users and schedulers see it: output, exit codes, and how fast help answers."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

REPO = Path(__file__).resolve().parent.parent


Penult = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, dataset: Callable[..., Path]) -> Path:
    return dataset(tmp_path_factory.mktemp("cli") / "photos", {"ants": 10, "bees": 10})


def test_the_whole_way(penult: Penult, photos: Path, backbone_file: Path, tmp_path: Path) -> None:
    cache, bundle = tmp_path / "p.cache", tmp_path / "p.head"
    code, out, err = penult("extract", photos, "-m", backbone_file, "-o", cache)
    assert code == 0, err
    assert out.startswith("20 inputs = 20 ok + 0 duplicates + 0 failed\n20 images on cpu")
    code, out, err = penult("extract", photos, "-m", backbone_file, "-o", cache, "--json")
    assert code == 0
    again = json.loads(out)
    assert (again["computed"], again["inference_calls"]) == (0, 0)
    assert "nothing to compute" in err

    code, out, _ = penult("info", cache)
    assert code == 0
    assert "20 rows of 512" in out
    assert [line.split() for line in out.splitlines() if line.strip().startswith("ants")] == [["ants", "6", "2", "2", "10"]]
    facts = json.loads(penult("info", cache, "--json")[1])
    assert facts["counts"] == {"inputs": 20, "ok": 20, "duplicates": 0, "failed": 0}
    assert facts["labels"]["bees"] == {"train": 6, "val": 2, "test": 2}
    assert facts["fingerprint"]["layer"] == "input of classifier.1"

    code, out, err = penult("train", cache, "--head", "logistic", "-o", bundle)
    assert code == 0
    assert "on 4 images of 'test'" in out
    assert "too few to conclude" in err
    assert re.search(r"2 classes, in [\d.]+ s \(.*report [\d.]+ s", out)
    assert penult("train", cache, "-o", bundle)[0] == 73
    seconds = json.loads(penult("train", cache, "-o", tmp_path / "s", "--few-shot", "1,2", "--json")[1])["seconds"]
    assert seconds.keys() == {"data", "leaks", "few_shot", "head", "int8_check", "scores", "report", "save", "total"}
    assert seconds["total"] == pytest.approx(sum(each for stage, each in seconds.items() if stage != "total"), abs=0.01)
    assert "seconds" not in json.loads((tmp_path / "s/head.json").read_text()), "a bundle says what it is"

    plot = tmp_path / "confusion.png"
    code, out, err = penult("evaluate", bundle, cache, "--plot", plot)
    assert code == 0
    assert "95 % Wilson" in out
    assert "true \\ predicted" in out
    with Image.open(plot) as image:
        assert image.format == "PNG"
    assert penult("evaluate", bundle, cache, "--plot", plot)[0] == 73
    scores = json.loads(penult("evaluate", bundle, cache, "--json")[1])
    assert sum(map(sum, scores["confusion"])) == 4
    assert penult("evaluate", bundle, cache, "--min-accuracy", "1.0")[0] == (0 if scores["accuracy"] == 1 else 65)
    assert penult("evaluate", bundle, cache, "--split", "train")[0] == 65
    assert penult("evaluate", bundle, cache, "--min-accuracy", "nan")[0] == 2, "a gate that is no number would never be met"
    code, _, err = penult("finetune", cache, "-m", "resnet18", "-o", tmp_path / "f", "--test-fraction", "0.5", "--limit", "5")
    assert code == 2
    assert "--limit, --test-fraction" in err

    images = [photos / "ants/000.jpg", photos / "bees/001.jpg"]
    code, out, _ = penult("predict", bundle, *images, "--format", "csv")
    table = list(csv.DictReader(io.StringIO(out)))
    assert [row["path"] for row in table] == list(map(str, images))
    assert all(float(row["p_ants"]) + float(row["p_bees"]) == pytest.approx(1, abs=2e-6) for row in table)
    lines = [json.loads(line) for line in penult("predict", bundle, *images, "--format", "jsonl")[1].splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in table]
    assert penult("compare", bundle, bundle)[0] == 2
    assert penult("train", cache, "--head", "mlp", "-o", tmp_path / "m.head")[0] == 0
    code, out, _ = penult("compare", bundle, tmp_path / "m.head", "-o", tmp_path / "report.html")
    assert code == 0
    assert "p.head" in out
    assert "m.head" in out
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_quiet_and_verbose_mean_the_same_before_and_after_the_command(
    penult: Penult, photos: Path, backbone_file: Path, tmp_path: Path
) -> None:
    command = ("extract", photos, "-m", backbone_file, "-o", tmp_path / "c", "--device", "cpu")
    assert "exported" in penult(*command)[2]
    assert "nothing to compute" in penult(*command)[2]
    for quiet in (("-q", *command), (*command, "-q"), (*command, "--quiet")):
        assert penult(*quiet)[::2] == (0, "")
    for verbose in (("-v", *command, "--overwrite"), (*command, "--overwrite", "-v")):
        assert "inputs done" in penult(*verbose)[2]
    assert penult("weights", "list", "-q")[0] == 0
    assert "Only warnings on stderr" in penult("weights", "list", "--help")[1]


@pytest.mark.usefixtures("exports_here")
def test_a_pixel_path_is_chosen_once_and_everything_after_it_follows(
    penult: Penult, photos: Path, backbone_file: Path, tmp_path: Path
) -> None:
    file, cache, bundle = tmp_path / "net.onnx", tmp_path / "p.cache", tmp_path / "p.head"
    network = ("squeezenet1_1", "--weights", "random:0", "--resize", "36", "--crop", "32")
    assert penult("export", *network, "--pixel-path", "pillow-draft", "-o", file)[0] == 0
    assert penult("extract", photos, "-m", file, "-o", cache)[0] == 0
    pixels = json.loads(penult("info", cache, "--json")[1])["fingerprint"]["pixels"]
    assert pixels["path"] == "pillow-draft-1"
    code, _, err = penult("extract", photos, "-m", backbone_file, "-o", cache)
    assert code == 65
    assert "pixels.path: pillow-draft-1 against pillow-1" in err
    code, _, err = penult("extract", photos, "-m", file, "-o", cache, "--pixel-path", "pillow-crop")
    assert code == 2
    assert "describes its own input and features" in err
    assert "leave --pixel-path out" in err
    assert penult("extract", photos, "-m", *network, "-o", tmp_path / "c", "--pixel-path", "opencv")[0] == 2
    assert penult("train", cache, "-o", bundle)[0] == 0
    facts = json.loads((bundle / "head.json").read_text())
    assert facts["backbone"]["preprocess"]["pixel_path"] == "pillow-draft"
    predicted = [json.loads(line) for line in penult("predict", bundle, photos, "--format", "jsonl")[1].splitlines()]
    assert len(predicted) == 20
    assert not any(each["code"] for each in predicted)


def test_a_csv_of_predictions_has_the_same_columns_in_every_row(
    penult: Penult, photos: Path, backbone_file: Path, tmp_path: Path
) -> None:
    assert penult("extract", photos, "-m", backbone_file, "-o", tmp_path / "c")[0] == 0
    assert penult("train", tmp_path / "c", "-o", tmp_path / "h")[0] == 0
    (tmp_path / "broken.jpg").write_text("no picture")
    code, out, _ = penult("predict", tmp_path / "h", tmp_path / "broken.jpg", photos / "ants/000.jpg", "--format", "csv")
    header, bad, good = csv.reader(io.StringIO(out))
    assert code == 3
    assert header == ["path", "label", "probability", "code", "message", "p_ants", "p_bees"]
    assert bad[1:4] == ["", "", "not_an_image"]
    assert bad[4]
    assert bad[5:] == ["", ""]
    assert good[3:5] == ["", ""]
    assert len(good) == 7
    facts = json.loads(penult("predict", tmp_path / "h", tmp_path / "broken.jpg", "--format", "jsonl")[1])
    assert (facts["code"], facts["message"], facts["probabilities"]) == ("not_an_image", bad[4], {})


def test_recorded_failures_exit_3_and_beyond_the_budget_65(
    penult: Penult, dataset: Callable[..., Path], backbone_file: Path, tmp_path: Path
) -> None:
    root = dataset(tmp_path / "photos", {"ants": 8, "bees": 8})
    (root / "ants/broken.jpg").write_bytes((root / "ants/000.jpg").read_bytes()[:400])
    (root / "bees/notes.jpg").write_text("not a picture")
    code, out, _ = penult("extract", root, "-m", backbone_file, "-o", tmp_path / "c")
    assert code == 3
    assert out.startswith("18 inputs = 16 ok + 0 duplicates + 2 failed (not_an_image 1, truncated 1)")
    assert penult("extract", root, "-m", backbone_file, "-o", tmp_path / "c")[0] == 3
    ledger = [json.loads(line) for line in (tmp_path / "c/ledger.jsonl").read_text().splitlines()]
    assert [(entry["path"], entry["code"]) for entry in ledger] == [
        ("ants/broken.jpg", "truncated"),
        ("bees/notes.jpg", "not_an_image"),
    ]
    code, _, err = penult("extract", root, "-m", backbone_file, "-o", tmp_path / "c", "--max-failures", "1")
    assert code == 65
    assert "2 of 18 inputs failed (not_an_image 1, truncated 1) and --max-failures 1 allows 1" in err
    assert penult("train", tmp_path / "c", "-o", tmp_path / "h")[0] == 65
    assert penult("extract", root, "-m", backbone_file, "-o", tmp_path / "d", "--on-error", "fail")[0] == 65


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["extract", "nowhere", "-m", "resnet18", "-o", "c"], 66, "nowhere does not exist"),
        (["extract", "{photos}", "-m", "resnet-18", "-o", "c"], 2, "did you mean 'resnet18'"),
        (
            ["extract", "{photos}", "-m", "resnet18", "-o", "c", "-b", "many"],
            2,
            '--batch-size is "many"; expected a whole number, or auto',
        ),
        (
            ["extract", "{photos}", "-m", "{backbone}", "-o", "c", "-b", "100000"],
            2,
            "--batch-size is 100000; expected 1 to 4096, or auto",
        ),
        (
            ["extract", "{photos}", "-m", "{backbone}", "-o", "c", "-j", "9999"],
            2,
            "--workers is 9999; expected 1 to 256",
        ),
        (["extract", "{photos}", "-m", "{backbone}", "-o", "c", "-j", "0"], 2, "--workers is 0; expected 1 to 256"),
        (
            ["train", "{photos}", "-o", "h", "--head", "mlp", "--hidden", "65537"],
            2,
            "--hidden is 65537; expected at most 65536",
        ),
        (
            ["train", "{photos}", "-o", "h", "--head", "mlp", "--hidden", "auto"],
            2,
            '--hidden is "auto"; expected a whole number',
        ),
        (["extract", "{photos}", "-m", "{backbone}", "-o", "c", "--device", "tpu"], 2, "expected auto, cpu, cuda"),
        (["extract", "{photos}", "-m", "{backbone}", "-o", "{photos}"], 73, "is not a penult cache"),
        (["extract", "{photos}", "-m", "{backbone}", "-o", "c", "--max-failures", "few"], 2, "such as 10, or a share"),
        (["extract", "{photos}", "-m", "gone.onnx", "-o", "c"], 66, "gone.onnx"),
        (["info", "nowhere"], 66, "does not exist"),
        (["train", "{photos}", "-o", "h"], 66, "not a penult cache"),
        (["evaluate", "nowhere", "nowhere"], 66, "is not a bundle"),
        (["run", "nowhere.toml"], 66, "cannot read"),
        (["export", "resnet18", "-o", "{backbone}"], 73, "--overwrite"),
        (["train", "{photos}"], 2, "Missing option"),
        (["frobnicate"], 2, "no command"),
        (["extract", "{photos}", "-m", "{backbone}", "-o", "c", "--resize", "9"], 2, "leave --resize out"),
        (["extract", "{photos}", "-m", "{backbone}", "-o", "c", "--max-failures", "-1"], 2, "such as 10, or a share"),
        (["extract", "{photos}", "-m", "{backbone}", "-o", "/proc/nowhere/c"], 73, "cannot create"),
        (["train", "{photos}", "-o", "h", "--seed", "-1"], 2, "--seed"),
        (["run", "{backbone}"], 78, "is not TOML"),
    ],
)
def test_errors_say_what_and_exit_with_their_code(
    penult: Penult,
    photos: Path,
    backbone_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = penult(*(a.format(photos=photos, backbone=backbone_file) for a in arguments))
    assert (found, out) == (code, "")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said_and_leaves_nothing_behind(
    penult: Penult, photos: Path, backbone_file: Path, tmp_path: Path
) -> None:
    code, _, err = penult("extract", photos, "-m", backbone_file, "-o", tmp_path / "c", "--device", "cuda")
    assert code == 69
    assert "--device cuda: this machine has no NVIDIA driver" in err
    assert not (tmp_path / "c").exists()


def test_a_bug_exits_70_with_a_traceback(penult: Penult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import store.cache

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(store.cache, "FeatureCache", broken)
    code, _, err = penult("info", tmp_path)
    assert code == 70
    assert "ZeroDivisionError" in err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["extract", "--help"]])
def test_help_costs_less_than_0_3_s_of_cpu(arguments: list[str]) -> None:
    """CPU time of a child, which a busy machine does not change much; importing torch alone would be ten times more."""

    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    best = 9.0
    for _ in range(3):
        before = cpu()
        subprocess.run([sys.executable, REPO / "cli.py", *arguments], check=True, capture_output=True, cwd=REPO)
        best = min(best, cpu() - before)
    assert best < 0.3


@pytest.mark.parametrize("shown", ["info {v1}/views.cache --json", "predict {v1}/logistic.head {v1}/photos --format csv"])
def test_nobody_reading_on_has_an_exit_code_of_its_own(shown: str, tmp_path: Path) -> None:
    shown = shown.format(v1=REPO / "tests/data/archives/v1")
    script = f"{sys.executable} {REPO / 'cli.py'} -q {shown} | true; echo status ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "status 141"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        ("--help | true", 141),
        ("info nowhere 2>&1 | true", 141),  # an error that nobody reads
        ("--version >&-", 0),
        ("info nowhere 2>&-", 66),
        ("info nowhere <&- >&- 2>&-", 66),
        ("info nowhere 2>/dev/full", 66),  # the disk of the log is full
        ("--version >/dev/full", 74),
    ],
)
def test_streams_that_are_closed_or_full_give_no_traceback(redirected: str, code: int, tmp_path: Path) -> None:
    command, bar, reader = redirected.partition(" | ")
    script = f"{{ {sys.executable} {REPO / 'cli.py'} {command}; echo $? >code; }}{bar}{reader}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (tmp_path / "code").read_text() == f"{code}\n", done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_sigint_while_importing_or_computing_never_shows_a_traceback(photos: Path, backbone_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, REPO / "cli.py", "extract", photos, "-m", backbone_file, "-o", tmp_path / "c", "--json"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO, env={**os.environ})
    assert child.stderr is not None
    child.stderr.readline()  # the first thing it says; from here on it is inside the command
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert b"Traceback" not in err
    assert child.returncode in (0, 130)


def test_predictions_as_csv_hold_any_class_and_no_formula(
    penult: Penult, backbone_file: Path, dataset: Any, tmp_path: Path
) -> None:
    photos = dataset(tmp_path / "photos", {"label": 6, "=1+1": 6})
    assert penult("extract", photos, "-m", backbone_file, "-o", tmp_path / "c")[0] == 0
    assert penult("train", tmp_path / "c", "--head", "centroid", "-o", tmp_path / "h")[0] == 0
    out = penult("predict", tmp_path / "h", photos, "--format", "csv")[1]
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["path", "label", "probability", "code", "message", "p_=1+1", "p_label"]
    assert {row["label"] for row in rows} <= {"label", "'=1+1"}
    assert not [cell for row in rows for cell in row.values() if cell.startswith("=")]


def test_the_json_of_a_run_holds_its_warnings(penult: Penult, photos: Path, backbone_file: Path, tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path,label,lable\n" + "".join(f"{path},x,y\n" for path in sorted(photos.glob("ants/*"))))
    code, out, err = penult("extract", table, "--root", "/", "-m", backbone_file, "-o", tmp_path / "c", "--json")
    assert code == 65, err  # absolute paths leave the root
    table.write_text("path,label,lable\n" + "".join(f"{path.relative_to(photos)},x,y\n" for path in photos.glob("ants/*")))
    code, out, err = penult("extract", table, "--root", photos, "-m", backbone_file, "-o", tmp_path / "c", "--json")
    assert code == 0, err
    assert f"{table}: these columns are not used: 'lable'" in json.loads(out)["warnings"]


def test_a_run_without_one_usable_input_does_not_say_that_all_is_cached(
    penult: Penult, backbone_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.jpg").write_text("no image")
    command = ("extract", tmp_path / "photos", "-m", backbone_file, "-o", tmp_path / "c", "--max-failures", "100%")
    code, out, err = penult(*command)
    assert code == 3
    assert "none of the 3 inputs could be used" in err
    assert "no input could be used" in out
    assert "nothing to compute" not in out + err


def test_info_counts_an_image_once(penult: Penult, photos: Path, backbone_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    shutil.copy(copy / "ants/000.jpg", copy / "ants/copy.jpg")
    assert penult("extract", copy, "-m", backbone_file, "-o", tmp_path / "c")[0] == 0
    facts = json.loads(penult("info", tmp_path / "c", "--json")[1])
    assert facts["counts"] == {"inputs": 21, "ok": 20, "duplicates": 1, "failed": 0}
    assert {label: sum(per.values()) for label, per in facts["labels"].items()} == {"ants": 10, "bees": 10}
