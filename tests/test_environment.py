"""Nothing is sent anywhere, and the home folder holds nothing but caches that are named."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import click
import pytest

import cli
from benchmarks import home
from extractor.commands.weights import weights
from store import environment

REPO = Path(__file__).resolve().parent.parent
SESSION = """
import json, socket, sys
asked, codes = [], []
def refuse(*given, **named):
    asked.append(repr(given))
    raise OSError("this test looks no host up")
for name in ("getaddrinfo", "getnameinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr"):
    setattr(socket, name, refuse)
import cli
from extractor.commands.weights import weights
for line in sys.argv[1:]:
    sys.argv = ["penult", *line.split()]
    try:
        cli.main()
    except SystemExit as error:
        codes.append(error.code or 0)
print(json.dumps([codes, asked]))
"""


def python(code: str, *arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in ``folder``, with ``folder/home`` as the home folder, in an environment that silences no library."""
    (folder / "home").mkdir(exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    given = {
        **home.bare_environment(folder / "home", folder / "tmp"),
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)


def test_commands_look_no_host_up_and_leave_a_fresh_home_folder_as_it_was(backbone_file: Path, tmp_path: Path) -> None:
    home.make_inputs(tmp_path, 24)
    shutil.copy(backbone_file, tmp_path / "net.onnx")
    chosen = [command for command in home.COMMANDS if command.quick]
    done = python(SESSION, *(command.line for command in chosen), folder=tmp_path)
    codes, asked = json.loads(done.stdout.splitlines()[-1])
    assert codes == [command.code for command in chosen], done.stderr
    assert asked == []
    assert home.strangers(tmp_path / "home") == []
    kept = sorted(path.name for path in (tmp_path / "home/.cache/penult").iterdir())
    assert kept == ["backbones", "matplotlib"], "a network was exported, and plots were drawn with a list of fonts"


def test_every_command_is_among_those() -> None:
    context = click.Context(cli.cli)
    names = {*cli.cli.list_commands(context), *(f"weights {name}" for name in weights.list_commands(context))} - {"weights"}
    lines = [command.line for command in home.COMMANDS]
    assert {name for name in names if not any(f"{line} ".startswith(f"{name} ") for line in lines)} == {"weights fetch"}


@pytest.mark.parametrize("package", ["store", "extractor", "classifiers"])
def test_importing_a_package_of_ours_first_silences_onnxruntime(package: str, tmp_path: Path) -> None:
    names = ("ORT_DISABLE_TELEMETRY", "HDF5_PLUGIN_PRELOAD", "OPENBLAS_THREAD_TIMEOUT")
    show = f"import os; print(*map(os.environ.get, {names}))"
    done = python(f"import {package}, onnxruntime; {show}", folder=tmp_path)
    assert (done.stdout, done.stderr) == ("1 :: 16\n", "")
    assert home.strangers(tmp_path / "home") == []
    theirs = python(
        f"import {package}; {show}",
        folder=tmp_path,
        ORT_DISABLE_TELEMETRY="0",
        HDF5_PLUGIN_PRELOAD="/plugins",
        OPENBLAS_THREAD_TIMEOUT="9",
    )
    assert theirs.stdout == "0 /plugins 9\n", "what the user has set stays"


def test_who_imports_onnxruntime_before_us_is_told_once(tmp_path: Path) -> None:
    code = "import onnxruntime, extractor, classifiers"
    told = python(code, folder=tmp_path, CI="1").stderr  # by itself it does not report from CI
    assert told.count("ORT_DISABLE_TELEMETRY=1 in the environment, or import penult's packages first") == 1
    assert python(code, folder=tmp_path, CI="1", ORT_DISABLE_TELEMETRY="0").stderr == ""


@pytest.fixture
def matplotlib_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("matplotlib")
    before = logger.level
    yield logger
    logger.setLevel(before)


@pytest.mark.parametrize(
    ("variables", "file", "where"),
    [
        ({}, None, "home/.cache/penult/matplotlib"),
        ({"XDG_CACHE_HOME": "xdg"}, None, "xdg/penult/matplotlib"),
        ({"XDG_CACHE_HOME": "xdg", "PENULT_CACHE": "kept"}, None, "kept/matplotlib"),
        ({"MPLCONFIGDIR": "theirs"}, None, "theirs"),
        ({"MATPLOTLIBRC": "theirs"}, None, None),
        ({}, "matplotlibrc", None),
        ({}, "home/.config/matplotlib/matplotlibrc", None),
        ({}, "home/.matplotlib/matplotlibrc", None),
        ({"XDG_CONFIG_HOME": "xdg"}, "xdg/matplotlib/matplotlibrc", None),
    ],
)
def test_matplotlib_is_redirected_unless_it_is_configured(
    variables: dict[str, str],
    file: str | None,
    where: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    matplotlib_logger: logging.Logger,
) -> None:
    monkeypatch.chdir(tmp_path)
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    with mock.patch.dict(os.environ, {"HOME": "home", **variables}, clear=True):
        environment.redirect_matplotlib()
        assert os.environ.get("MPLCONFIGDIR") == where
        assert ("MPL_IGNORE_SYSTEM_FONTS" in os.environ) == ("penult" in str(where) or where == "kept/matplotlib")


def test_without_a_place_to_write_plots_are_drawn_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = (
        "from store.environment import redirect_matplotlib as call; call(); import matplotlib; print(matplotlib.get_cachedir())"
    )
    done = python(code, folder=tmp_path, HOME=str(tmp_path / "file"))
    assert done.stdout.startswith(str(tmp_path / "tmp"))
    assert done.stderr == ""
    assert list((tmp_path / "tmp").iterdir()) == []
