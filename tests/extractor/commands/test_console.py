"""What is printed for people: names from files reach the terminal with their control characters escaped."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from extractor.text_table import table
from store.errors import printable
from store.format.samples import SampleTable

V1 = Path(__file__).resolve().parents[2] / "data/archives/v1"
Penult = Callable[..., tuple[int, str, str]]
CLEAR, FORGED, TURNED, MARKUP = "bl\x1b[2Jue", "green\nerror: forged\r", "red\u202egpj", "[/]"
NAMES = {"blue": CLEAR, "green": FORGED, "red": TURNED}


def harmless(text: str) -> bool:
    """Whether nothing in a text moves the cursor, changes a colour, turns the text, or begins a line of its own."""
    return all(line.replace("\t", "").isprintable() and not line.startswith("error: forged") for line in text.split("\n"))


def named(cache: Path, names: dict[str, str]) -> Path:
    """A copy of the archived cache with other labels, as no penult would have stored them."""
    shutil.copytree(V1 / "photos.cache", cache)
    samples = SampleTable.read(cache / "samples.h5")
    rows = [replace(row, label=None if row.label is None else names[row.label]) for row in samples.rows]
    (cache / "samples.h5").write_bytes(SampleTable(rows, samples.facts).to_bytes())
    return cache


@pytest.mark.parametrize("names", [NAMES, {"blue": MARKUP, "green": "[red]green", "red": "[link=x]red"}])
def test_labels_from_a_cache_are_escaped_where_people_read_them(names: dict[str, str], tmp_path: Path, penult: Penult) -> None:
    cache, head, other = named(tmp_path / "c.cache", names), tmp_path / "c.head", tmp_path / "d.head"
    images, shown = sorted((V1 / "photos").rglob("*.jpg"))[:3], [printable(name) for name in names.values()]
    commands = {
        "info": (cache,),
        "verify": (cache,),
        "train": (cache, "-o", head, "--head", "ridge"),
        "evaluate": (head, cache),
        "diff": (V1 / "photos.cache", cache),
        "report": (head, "-o", tmp_path / "page.html"),
        "fuse": (head, "-o", tmp_path / "one.onnx"),
        "predict": (head, *images),
    }
    printed = {}
    for command, arguments in commands.items():
        code, out, err = penult(command, *arguments)
        assert (code == 0) or command == "verify", (command, err)
        assert "Traceback" not in err
        assert harmless(out), (command, out)
        assert harmless(err), (command, err)
        printed[command] = out
    for command in ("info", "evaluate"):
        assert all(name in printed[command] for name in shown), (command, printed[command])
    assert any(name in printed["predict"] for name in shown)
    assert penult("train", cache, "-o", other, "--head", "centroid")[0] == 0
    code, out, err = penult("compare", head, other)
    assert code == 0
    assert harmless(out + err)
    _, out, err = penult("predict", tmp_path / "one.onnx", *images)
    assert harmless(out + err)
    assert out.splitlines()


def test_csv_and_json_have_the_exact_text(tmp_path: Path, penult: Penult) -> None:
    cache, head = named(tmp_path / "c.cache", NAMES), tmp_path / "c.head"
    image = next((V1 / "photos").rglob("*.jpg"))
    assert list(json.loads(penult("info", cache, "--json")[1])["labels"]) == sorted(NAMES.values())
    assert json.loads(penult("train", cache, "-o", head, "--head", "ridge", "--json")[1])["classes"] == sorted(NAMES.values())
    out = penult("predict", head, image, "--format", "jsonl")[1]
    assert "\x1b" not in out, "JSON escapes it"
    assert list(json.loads(out)["probabilities"]) == sorted(NAMES.values())
    heading = next(csv.reader(io.StringIO(penult("predict", head, image, "--format", "csv")[1], newline="")))
    assert [name.removeprefix("p_") for name in heading[-3:]] == sorted(NAMES.values())


def test_csv_and_json_have_the_exact_path(tmp_path: Path, penult: Penult) -> None:
    """Screenshots of macOS have a narrow blank in their names; a list of predictions must fit the list of files."""
    names = [b"at 3.00\xe2\x80\xafPM.jpg", b"caf\xe9.jpg", b"two\nlines.jpg"]
    for name in names:
        shutil.copy(next((V1 / "photos").rglob("*.jpg")), os.path.join(os.fsencode(tmp_path), name))  # noqa: PTH118
    wanted = [f"{tmp_path}/{name}" for name in ("at 3.00\u202fPM.jpg", "caf\\xe9.jpg", "two\nlines.jpg")]
    out = penult("predict", V1 / "logistic.head", tmp_path, "--format", "jsonl")[1]
    assert [json.loads(line)["path"] for line in out.splitlines()] == wanted
    out = penult("predict", V1 / "logistic.head", tmp_path, "--format", "csv")[1]
    assert [row["path"] for row in csv.DictReader(io.StringIO(out, newline=""))] == wanted
    assert "at 3.00\\u202fPM.jpg" in penult("predict", V1 / "logistic.head", tmp_path)[1]


def test_the_json_of_a_command_has_all_its_warnings(tmp_path: Path, penult: Penult) -> None:
    photos = shutil.copytree(V1 / "photos", tmp_path / "photos")
    for i in range(2):
        shutil.copy(V1 / "extra.jpg", photos / f"test/blue/extra{i}.jpg")
    code, out, err = penult("evaluate", V1 / "logistic.head", photos, "--json")
    assert code == 3
    warnings = json.loads(out)["warnings"]
    assert any(text.endswith("they are not in the scores") for text in warnings), err
    assert any("1 of 14 images are exact copies of others among them" in text for text in warnings), err
    assert all(f"warning: {text}" in err for text in warnings)
    assert json.loads(penult("info", V1 / "photos.cache", "--json")[1])["warnings"] == []


def test_a_class_folder_with_control_characters(tmp_path: Path, penult: Penult) -> None:
    photos, cache, head = tmp_path / "photos", tmp_path / "c.cache", tmp_path / "c.head"
    images = sorted((V1 / "photos").rglob("*.jpg"))
    for i, image in enumerate(images):
        folder = photos / ("a\x1b[31m\nerror: forged" if i % 2 else "b\r\u202e")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / f"{i}\x1b[2J.jpg")
    (photos / "a\x1b[31m\nerror: forged" / "broken\x1b.jpg").write_bytes(b"no image")
    for name in ("network.onnx", "network.toml"):
        shutil.copy(V1 / name, tmp_path)
    commands = (
        ("extract", photos, "-m", tmp_path / "network.onnx", "-o", cache, "--max-failures", "50%"),
        ("info", cache),
        ("train", cache, "-o", head, "--head", "centroid"),
        ("evaluate", head, cache),
        ("predict", head, photos),
        ("info", tmp_path / "no\x1b]0;title\x07\r.cache"),  # click itself removes colours, where no terminal is
        ("extract", photos, "-m", "net\r\x1bc", "-o", tmp_path / "d.cache"),
        ("info", "--no\r\x1bc", cache),
    )
    codes = []
    for command in commands:
        code, out, err = penult(*command)
        codes.append(code)
        assert "Traceback" not in err
        assert harmless(out), (command, out)
        assert harmless(err), (command, err)
    assert codes == [3, 0, 0, 0, 3, 66, 2, 2]


def test_log_messages_are_escaped(penult: Penult, capfd: pytest.CaptureFixture[str]) -> None:
    penult("info", "nowhere")  # sets the handler
    logging.getLogger("penult.extractor").warning("the label %s", FORGED)
    assert capfd.readouterr().err == "warning: the label green\\nerror: forged\\r\n"


def test_a_table_escapes_cells_and_headings_and_takes_neither_for_markup() -> None:
    text = table(["label", "[/]", "\x1b[2J"], [[f"{CLEAR}[red]x", "1", "2"]])
    assert harmless(text)
    assert text.split()[:3] == ["label", "[/]", r"\x1b[2J"]
    assert r"bl\x1b[2Jue[red]x" in text
    narrow = table(["label", "\x1b[2J"], [["\x1b" * 40, "1"]], width=20)
    assert harmless(narrow)


def test_text_in_any_script_stays_as_it_is() -> None:
    for text in ("Käfer", "ミツバチ", "🐝", "a b", "نحلة", "a\\b"):
        assert printable(text) == text
    assert printable("a\tb\nc", keep="\n\t") == "a\tb\nc"
    assert printable(os.fsdecode(b"\xff")) == "\\udcff"
