"""The rules of the house, read from the source: floors, safety, names, and that the documents are true."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

import cli

REPO = Path(__file__).resolve().parent.parent
FLOORS = ["store", "extractor", "classifiers", "cli"]
SOURCES = [path for floor in FLOORS[:3] for path in sorted((REPO / floor).glob("*.py"))] + [REPO / "cli.py"]


def floor_of(path: Path) -> str:
    return path.stem if path.parent == REPO else path.parent.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{floor_of(path)}/{path.stem}")
def test_imports_point_downwards(path: Path) -> None:
    mine = FLOORS.index(floor_of(path))
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            top = name.partition(".")[0]
            if top in FLOORS:
                assert FLOORS.index(top) < mine, f"line {node.lineno}: {floor_of(path)} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{floor_of(path)}/{path.stem}")
def test_nothing_that_executes_what_it_loads(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {"joblib", "dill", "cloudpickle", "pickle", "marshal", "shelve"} & set(modules), f"line {node.lineno}"
        if isinstance(node, ast.keyword):
            value = getattr(node.value, "value", None)
            assert (node.arg, value) not in {("weights_only", False), ("allow_pickle", True)}, f"line {node.value.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load":
            safe = [keyword for keyword in node.keywords if keyword.arg == "weights_only"]
            assert [ast.unparse(keyword.value) for keyword in safe] == ["True"], f"line {node.lineno}: torch.load"
        if isinstance(node, ast.Name) and node.id in ("eval", "exec"):
            pytest.fail(f"line {node.lineno}: {node.id}")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{floor_of(path)}/{path.stem}")
def test_only_the_command_line_prints_and_exits(path: Path) -> None:
    if path.name == "cli.py":
        return
    allowed = {("export.py", "print")}  # the answer of the export's child process
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("print", "sys.exit", "exit", "quit"):
                assert (path.name, called) in allowed, f"line {node.lineno}: {called}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{floor_of(path)}/{path.stem}")
def test_libraries_and_children_are_told_what_store_environment_says(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
        early = {"onnxruntime", "matplotlib", "lightning"} & {name.partition(".")[0] for name in names}
        assert not early, f"line {node.lineno}: {early} comes with the module; import it where it is used"
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "env":
            told = ast.unparse(node.value)
            assert told.startswith("os.environ |"), f"line {node.value.lineno}: a child is told {told}"


@pytest.mark.parametrize("path", sorted((REPO / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_is_there(path: Path) -> None:
    """Nobody runs them for weeks: a name that has moved would show only then."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FLOORS:
            module = importlib.import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                inside = hasattr(module, "__path__") and importlib.util.find_spec(f"{node.module}.{name}")
                assert inside or hasattr(module, name), f"line {node.lineno}: {node.module} has no {name}"


def test_our_top_level_names_are_ours_alone() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in FLOORS:
        assert set(owners.get(name, ["penult"])) == {"penult"}, name


def test_no_vague_module_names() -> None:
    vague = {"utils", "util", "common", "helpers", "base", "misc"}
    assert not [path for path in SOURCES if path.stem in vague]


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [REPO / name.decode() for name in done.stdout.split(b"\0") if name and (REPO / name.decode()).is_file()]


def test_tracked_files_are_small_and_name_no_package_host() -> None:
    host = re.compile(rb"--(?:extra-)?index-" + rb"url|--find-" + rb"links|pypi\." + rb"org|files\.python" + rb"hosted")
    for path in tracked():
        data = path.read_bytes()
        assert len(data) < 2_000_000, path
        assert not host.search(data), path


def test_the_lock_pins_every_requirement_with_a_hash() -> None:
    text = (REPO / "requirements.lock").read_text()
    pins = re.findall(r"^([a-z0-9][a-z0-9.-]*)==[^ ]+.*\\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", text, re.MULTILINE)
    declared = re.findall(r"^[a-z][^ ]*(?=.*\\$)", text, re.MULTILINE)
    assert len(pins) == len(declared) > 50


def commands() -> dict[str, click.Command]:
    """Every command by what one types after ``penult``, those of a group included."""
    groups = {name: command.commands for name, command in cli.cli.commands.items() if isinstance(command, click.Group)}
    inner = {f"{group} {name}": command for group, members in groups.items() for name, command in members.items()}
    return {**cli.cli.commands, **inner}


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_begins_with_a_sentence_and_ends_with_an_example(name: str) -> None:
    text = inspect.cleandoc(commands()[name].help or "")
    assert text.split("\n\n")[0].rstrip().endswith(".")
    assert text.split("\n\n")[-1].startswith(f"Example: penult {name} ")


def readme_commands() -> list[str]:
    text = (REPO / "README.md").read_text() + (REPO / "docs/data.md").read_text()
    blocks = re.findall(r"```(?:console|sh|bash)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("penult ")]


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_in_the_readme_exists_with_its_flags(line: str) -> None:
    words = shlex.split(line.partition("#")[0].partition("|")[0].partition(">")[0])[1:]
    command = commands().get(" ".join(words[:2])) or (cli.cli if words[0].startswith("-") else commands()[words[0]])
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for word in words[1:]:
        if word.startswith("-") and not re.fullmatch(r"-?[\d.]+", word):
            assert word in known | {"--help"}, f"{word} in: {line}"


def test_the_readme_names_every_command() -> None:
    text = (REPO / "README.md").read_text()
    assert [name for name in commands() if f"penult {name}" not in text] == []
