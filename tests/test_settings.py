"""Settings: the same value in a flag, a job file and Python is taken or refused alike, for every field of every model."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

import cli
from classifiers.bundles.settings import EvaluateSettings
from classifiers.comparison.settings import SweepSettings
from classifiers.finetuning.settings import FineTuneOptions, FineTuneSettings
from classifiers.heads.registry import ROWS
from classifiers.jobs.job_file import keys_of, models, read_job
from classifiers.training.settings import train_settings
from extractor.backbones.registry import BACKBONE_FIELDS, listed, weights_of
from extractor.commands.console import SettingsCommand
from extractor.pipeline.settings import ExtractSettings, Options
from extractor.pixels.augment import NAMES, NONE, STANDARD
from extractor.pixels.preprocess import FILTERS, PIXEL_PATHS
from extractor.settings import (
    FLAGS,
    Place,
    Settings,
    bounds_of,
    choices_of,
    face,
    flag_of,
    group_of,
    groups,
    is_list,
    key_of,
    kinds_of,
)
from store.errors import JobFileError, PenultError, UsageError

REPO = Path(__file__).resolve().parent.parent
CONTEXT = click.Context(cli.cli, info_name="penult")
EVERY = {name: cli.cli.get_command(CONTEXT, name) for name in cli.cli.list_commands(CONTEXT)}
COMMANDS = {name: each for name, each in EVERY.items() if isinstance(each, SettingsCommand)}
KEYS = Place(key_of, JobFileError)
OF_FILES = ("mean", "std", "input_range", "interpolation", "channels", "squash", "layout")
OF_VIEWS = ("augment", "crop_area", "flip", "rotation", "translation", "shear", "zoom", "brightness", "contrast")
# Text for settings that are neither numbers nor choices: some that is right, and some that is wrong
TEXTS = {
    "backbone": (["resnet18", "net.onnx"], ["resnt18"]),
    "weights": (["V1", "random:3"], ["V9", "gone.pth"]),
    "preset": (["IMAGENET1K_V1"], ["V9"]),
    "device": (["cpu", "cuda:1", "cuda:0,cuda:1"], ["gpu", "cpu,cuda", "cuda:x"]),
    "max_failures": (["3", "2.5%"], ["few", "-1", "%"]),
    "max_memory": (["4GB", "1000000"], ["4 QB", "much"]),
    "head": ([row.name for row in ROWS], ["forest", "sklearn.svm.SVC"]),
    "input_range": (["1", "255"], ["2", "many"]),
}


@dataclass(frozen=True)
class Case:
    """A value of one setting of a command, as one types it; None is the flag alone, or without."""

    command: str
    name: str
    text: str | None

    def __str__(self) -> str:
        return f"{self.command} {self.name} {self.text}"

    @property
    def model(self) -> type[Settings]:
        return COMMANDS[self.command].model


def values_of(model: type[Settings], name: str) -> Iterator[str | None]:
    """Right and wrong values of a setting."""
    kinds = kinds_of(model, name)
    if name in TEXTS:
        yield from (text for texts in TEXTS[name] for text in texts)
    elif choices := choices_of(model, name):
        yield from (*choices, "nonsense", "3")
    elif kinds == {bool}:
        yield None
    elif kinds & {int, float}:
        numbers = [f"{float(each):.10g}" for each in re.findall(r"\d[\d.]*", bounds_of(model, name))] or ["1"]
        around = [f"{float(each) + step:.10g}" for each in numbers for step in (-1, -0.5, 0, 0.5, 1)]
        yield from dict.fromkeys([*around, "many", "nan", "1.5", "10000000000"])
        if is_list(model, name):
            yield from ("1,2,3", "1,x", "1,,2")
    else:
        yield from ("some/text", "3")


def cases() -> Iterator[Case]:
    """Every value of every setting; of one that several commands share, all of them once and the first ones for each."""
    seen = set()
    for command, each in COMMANDS.items():
        for group, names in groups(each.model, "cli"):
            for name in names:
                values = list(values_of(each.model, name))
                yield from (Case(command, name, text) for text in (values[:2] if (group, name) in seen else values))
                seen.add((group, name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``net.onnx`` is; nobody opens it."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "net.onnx").touch()
    return folder


def beside(case: Case) -> dict[str, Any]:
    """What else must be said for a setting to make sense."""
    found: dict[str, Any] = {}
    if "backbone" in case.model.model_fields:
        found["backbone"] = "net.onnx" if case.name in OF_FILES else "resnet18"
    if "views" in case.model.model_fields and case.name in OF_VIEWS and case.text != "none":
        found["views"] = 2
    if case.name == "views" and case.text == "1":
        found["augment"] = "standard"
    if case.name == "targets":
        found["task"] = "regression"
    if case.text == "regression":
        found["targets"] = ["age"]
    if case.name in ("val_fraction", "test_fraction"):
        found[{"val": "test", "tes": "val"}[case.name[:3]] + "_fraction"] = 0.0
    for row in ROWS:
        if case.name in row.settings.model_fields and "head" in case.model.model_fields:
            found["head"] = row.name
    found.pop(case.name, None)
    return found


def as_toml(model: type[Settings], name: str, text: str | None) -> str:
    """What somebody would write into a job file who means what somebody else types."""
    if text is None:
        return "true" if model.model_fields[name].default is not True else "false"

    def one(part: str) -> str:
        number = kinds_of(model, name) & {int, float} and re.fullmatch(r"-?[0-9.]+(e\+?[0-9]+)?|nan", part)
        return part if number else json.dumps(part)

    if is_list(model, name):
        return f"[{', '.join(map(one, [text] if face(model, name).get('repeat') else text.split(',')))}]"
    return one(text)


def outcome(read: Callable[[], Any], model: type[Settings], name: str) -> Any:
    """What a setting is then; or why it is refused, with the settings named as in Python."""
    try:
        return getattr(read(), name)
    except PenultError as error:
        text = str(error)
    for each in sorted(model.model_fields, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.-])({re.escape(flag_of(model, each))}|{re.escape(key_of(model, each))})(?![\w-])", each, text)
    return text


def test_a_flag_a_key_and_an_argument_are_taken_and_refused_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting of every command, with values on both sides of its bounds."""
    monkeypatch.chdir(folder)
    different, counts = [], {"taken": 0, "refused": 0}
    for case in cases():
        model, name, around = case.model, case.name, beside(case)
        document = tomllib.loads(f"value = {as_toml(model, name, case.text)}\n")
        flags = [flag_of(model, name) if case.text is not None or document["value"] else f"--no-{name}"]
        flags += [] if case.text is None else [case.text]
        for each, value in around.items():
            flags += [flag_of(model, each), *map(str, value if isinstance(value, list) else [value])]
        command = COMMANDS[case.command]
        own = [argument.name for argument in command.params if isinstance(argument, click.Argument)]
        needed = {"output": ["-o", "out"], "sources": ["--backbone", "resnet18"]}
        flags += [word for each in command.params for word in needed.get(str(each.name), []) if each.name not in own]
        words = ["words" for each in own if each not in model.model_fields]
        if "backbone" in own:  # an argument of the command
            at = flags.index("--backbone")
            words, flags = [flags[at + 1]], flags[:at] + flags[at + 2 :]
        results = [
            outcome(lambda: command.settings(command.make_context("x", [*flags, "--", *words])), model, name),  # noqa: B023
            outcome(lambda: model.read({name: document["value"], **around}, KEYS), model, name),  # noqa: B023
            outcome(lambda: model(**{name: document["value"], **around}), model, name),  # noqa: B023
        ]
        if name == "head" and case.text and "." in case.text:  # in Python alone
            assert results[2] == case.text
            results[2] = results[0]
        refused = isinstance(results[0], str) and ("expected" in results[0] or " " in results[0] or "exist" in results[0])
        counts["refused" if refused else "taken"] += 1
        same = results[0] == results[1] == results[2] or str(results[0]) == str(results[1]) == str(results[2]) == "nan"
        different += [] if same else [f"{case}: {results}"]
    assert different == [], "\n".join(different)
    assert counts["taken"] > 200
    assert counts["refused"] > 200


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_the_same_everywhere(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    model = COMMANDS[command].model
    needed = {"backbone": "resnet18"} if "backbone" in model.model_fields else {}
    typed, written, made = model.read(needed, FLAGS), model.read(needed, KEYS), model(**needed)
    assert typed == written == made
    for name, field in model.model_fields.items():
        assert field.is_required() or getattr(made, name) == field.default, name


@pytest.mark.parametrize(
    ("model", "given", "says"),
    [
        (Options, {"val_fraction": 0.5, "test_fraction": 0.5}, "<val_fraction> 0.5 and <test_fraction> 0.5 leave nothing"),
        (Options, {"views": 3, "augment": "none"}, "<views> 3 without an augmentation is 3 times the same"),
        (Options, {"rotation": 5.0}, "an augmentation needs <views> of 2 or more"),
        (Options, {"precision": "int8", "device": "cuda"}, "<precision> int8 is for the CPU, not for <device> cuda"),
        (Options, {"precision": "tf32", "device": "cpu"}, "<precision> tf32 is for a GPU"),
        (SweepSettings, {"task": "regression"}, "<task> regression needs <targets>"),
        (SweepSettings, {"targets": ["age"]}, "<targets> age: numeric targets are for <task> regression"),
        (SweepSettings, {"targets": ["a", "a"], "task": "regression"}, "<targets> names a column twice"),
        (SweepSettings, {"head": "knn", "task": "multi-label"}, "<head> knn: expected logistic, mlp for multi-label"),
        (ExtractSettings, {"backbone": "resnt18"}, "no backbone 'resnt18'; did you mean 'resnet18'"),
        (ExtractSettings, {"backbone": "resnet18", "crop": 9, "resize": 8}, "<crop> 9 is larger than <resize> 8"),
        (ExtractSettings, {"backbone": "resnet18", "weights": "random:x"}, "<weights> random:x: the seed must be an integer"),
        (ExtractSettings, {"backbone": "net.onnx", "weights": "V1", "preset": "V1"}, "leave <weights>, <preset> out"),
        (ExtractSettings, {"backbone": "resnet18", "squash": True}, "leave <squash> out"),
        (
            ExtractSettings,
            {"backbone": "resnet18", "views": 2, "pixel_path": "pillow-draft"},
            "<views> needs whole images, and <pixel_path> pillow-draft makes only the crop",
        ),
        (train_settings(), {"head": "mlp", "C": 1.0}, "<C> is a setting of the logistic head, and this is mlp"),
        (train_settings(), {"k": 3}, "<k> is a setting of the knn head, not of the default; say <head> knn"),
        (FineTuneOptions, {"epochs": 2, "warmup": 2.0}, "<warmup> is 2.0; expected less than the 2 epochs of <epochs>"),
        (FineTuneOptions, {"precision": "fp16", "device": "cpu"}, "<precision> fp16 needs a GPU"),
        (FineTuneSettings, {"backbone": "net.onnx"}, "<backbone> net.onnx is an ONNX file and cannot be trained"),
    ],
)
def test_rules_about_several(
    model: type[Settings], given: dict[str, Any], says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for place in (FLAGS, KEYS):
        expected = re.sub(r"<(\w+)>", lambda found: place.spell(model, found[1]), says)  # noqa: B023
        with pytest.raises(place.error, match=re.escape(expected)):
            model.read(given, place)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Options(views=0, batch_size=0, nonsense=1)  # type: ignore[call-arg]
    assert str(caught.value) == (
        "there is no setting 'nonsense'; batch_size is 0; expected 1 to 4096, or auto; views is 0; expected 1 to 64"
    ) or set(str(caught.value).split("; ")) >= {"there is no setting 'nonsense'", "views is 0", "batch_size is 0"}


def test_all_that_commands_are_told_about_a_run_a_job_can_be_told(tmp_path: Path) -> None:
    """What is not a key says where results go, or what is printed."""
    keys = {name for section in models() for name in keys_of(section).values()}
    for command in ("extract", "train"):
        for _, names in groups(COMMANDS[command].model, "cli"):
            assert set(names) <= keys, command
    others = {"data", "cache", "bundle", "output", "as_json", "overwrite", "plot", "metrics", "log_json", "dry_run", "help"}
    not_settings = {str(each.name) for name in ("extract", "train", "evaluate") for each in COMMANDS[name].params}
    assert not_settings - others - {"quiet", "verbose"} == set()
    text = '[backbone]\nname = "resnet18"\noverwrite = true\n[extract]\nbackbone = "x"\ncrop = 9\ntf32 = true\n'
    (tmp_path / "job.toml").write_text(f'data = "x"\ncache = "c"\nbundle = "b"\n{text}')
    with pytest.raises(JobFileError) as caught:
        read_job(tmp_path / "job.toml")
    for part in (
        "'backbone.overwrite'",
        "'extract.backbone'",
        "there is one in [backbone]",
        'precision = "tf32"',
    ):
        assert part in str(caught.value)


def test_choices_and_rows_are_what_the_code_knows() -> None:
    assert choices_of(ExtractSettings, "augment") == NAMES
    assert choices_of(ExtractSettings, "pixel_path") == tuple(PIXEL_PATHS)
    assert choices_of(ExtractSettings, "interpolation") == tuple(FILTERS)
    assert Options().augmentation == STANDARD
    assert Options(augment="none").augmentation == NONE
    assert (Options(views=2, flip="both").augmentation.flip, Options(views=2, flip="vertical").augmentation.flip) == (0.5, 0.0)
    assert {name for name in BACKBONE_FIELDS if name not in ExtractSettings.model_fields} == {"name"}
    for row in ROWS:  # what a head is told is what its model says, and so is what it does untold
        parameters = inspect.signature(type(row.make()).__init__).parameters
        for name, field in row.settings.model_fields.items():
            assert parameters[name].default == field.default, f"{row.name}.{name}"
            assert group_of(train_settings(), name).section == "train"


def test_networks_and_weights_are_those_of_torchvision() -> None:
    """They are read from its source, without importing it."""
    from torchvision import models as networks

    assert list(listed()) == sorted(networks.list_models(module=networks))
    for name, weights in listed().items():
        enum = networks.get_model_weights(name)
        assert set(weights) == {entry.name for entry in enum}
        assert weights[0] == getattr(enum, "DEFAULT", enum[weights[0]]).name
    assert list(weights_of("resnet50")) == ["IMAGENET1K_V2", "IMAGENET1K_V1"]


def test_the_documents_are_what_the_models_say() -> None:
    code = "import runpy; made = runpy.run_path('docs/reference.py', run_name='test')['pages']()\n"
    code += "import sys; sys.exit(', '.join(p.name for p, text in made.items() if p.read_text('utf-8') != text) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}: run `make docs`"


def test_help_is_in_sections_and_fits() -> None:
    listing = cli.cli.get_help(CONTEXT)
    assert "..." not in listing.partition("Options:")[2]
    text = COMMANDS["extract"].get_help(click.Context(COMMANDS["extract"], info_name="penult extract"))
    headings = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert headings[0].startswith("Backbone")
    assert headings[-2:] == ["Output", "Messages"]
    assert len(headings) == len(set(headings)) > 6
    for name in ExtractSettings.model_fields:
        if face(ExtractSettings, name).get("only") is None:
            assert f"{flag_of(ExtractSettings, name)} " in text or f"{flag_of(ExtractSettings, name)}\n" in text, name


def test_nothing_heavy_is_imported_for_help_and_no_pydantic_by_children() -> None:
    code = "import sys; sys.argv = ['penult', *sys.argv[1:], '--help']\nimport cli\ntry: cli.main()\n"
    code += "except SystemExit: print(*({'numpy', 'torch', 'pydantic', 'onnxruntime', 'PIL'} & set(sys.modules)), 'end')"
    for words, expected in (([], "end"), (["extract"], "pydantic end"), (["train"], "pydantic end")):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=REPO, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == expected
    from extractor.pixels import decoder
    from extractor.runtime import devices

    for start in (decoder.START, devices.START):  # what its children are started with
        code = f"import sys; {start.partition(';')[0]}; print('pydantic' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False", start


def test_evaluate_has_the_gates_of_jobs() -> None:
    gates = {name for name in keys_of("gate").values() if name != "split"}
    assert gates <= set(EvaluateSettings.model_fields)
