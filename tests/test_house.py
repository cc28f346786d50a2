"""The rules of the house, read from the source: floors, rooms, circles, sizes, names; and that the documents are true."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

import cli

REPO = Path(__file__).resolve().parent.parent
FLOORS = ["store", "extractor", "classifiers", "cli"]
SOURCES = [path for floor in FLOORS[:3] for path in sorted((REPO / floor).rglob("*.py"))] + [REPO / "cli.py"]
MOST_MODULES = 12  # of a folder
MOST_PARAMETERS = 8  # of a function; a scikit-learn estimator's __init__ has all its settings
MOST_LINES = 200  # of cli.py
# The rooms of each floor, modules or sub-packages: each imports what stands before it, and any room of a floor below.
ROOMS = {
    "store": "errors environment faces progress fingerprint tasks format splits writer cache compact verify drift testing",
    "extractor": "machine signals prometheus run_log text_table futures settings "
    "pixels data graphs runtime backbones precision pipeline commands",
    "classifiers": "evaluation heads.solvers heads near_copies bundles "
    "reports training finetuning comparison jobs demo commands",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO).with_suffix(""))


def floor_of(path: Path) -> str:
    return name_of(path).partition("/")[0]


def modules(root: Path) -> dict[str, Path]:
    """The modules of the three floors by their dotted names; a package has the name of its folder."""
    paths = [path.relative_to(root) for floor in FLOORS[:3] for path in sorted((root / floor).rglob("*.py"))]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): root / path for path in paths}


def imports(root: Path) -> dict[str, set[str]]:
    """What each module imports of the others, inside functions and for types alone included."""
    known = modules(root)
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & set(known)
            if isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                for alias in node.names:
                    found[name] |= ({f"{base}.{alias.name}"} & set(known)) or ({base} & set(known))
    return found


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Modules that import each other, directly or by others."""
    names = sorted(edges)
    matrix = np.array([[b in edges[a] and a != b for b in names] for a in names])
    labels = connected_components(matrix, connection="strong")[1]
    groups = [{names[i] for i in np.flatnonzero(labels == label)} for label in np.unique(labels)]
    return [group for group in groups if len(group) > 1] + [{name} for name in names if name in edges[name]]


def heaps(root: Path) -> dict[str, int]:
    """Folders with more modules than anyone oversees."""
    folders = {path.parent for path in modules(root).values()}
    sizes = {folder: len([path for path in folder.glob("*.py") if path.stem != "__init__"]) for folder in folders}
    return {".".join(folder.relative_to(root).parts): size for folder, size in sizes.items() if size > MOST_MODULES}


def wide(root: Path) -> dict[str, int]:
    """Functions with more parameters than anyone remembers."""

    def functions(node: ast.AST, name: str, bases: str = "") -> Iterator[tuple[str, ast.FunctionDef, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from functions(child, f"{name}.{child.name}", " ".join(map(ast.unparse, child.bases)))
            elif isinstance(child, ast.FunctionDef):
                yield f"{name}.{child.name}", child, bases
                yield from functions(child, f"{name}.{child.name}")
            else:
                yield from functions(child, name, bases)

    found = {}
    for module, path in [*modules(root).items(), *({"cli": root / "cli.py"} if (root / "cli.py").exists() else {}).items()]:
        for name, function, bases in functions(ast.parse(path.read_text()), module):
            given = function.args
            count = len(
                [each for each in (*given.posonlyargs, *given.args, *given.kwonlyargs) if each.arg not in ("self", "cls")]
            )
            estimator = function.name == "__init__" and ("BaseEstimator" in bases or bases.endswith("Head"))
            if count > MOST_PARAMETERS and not estimator:
                found[name] = count
    return found


def room_of(module: str) -> tuple[str, int]:
    """The floor of a module, and the place of its room in `ROOMS`; -1 where it is in none."""
    floor, _, rest = module.partition(".")
    rooms = ROOMS[floor].split()
    mine = [room for room in rooms if f"{rest}.".startswith(f"{room}.")]
    return floor, rooms.index(max(mine, key=len)) if mine else -1


def wrong_ways(edges: Mapping[str, set[str]]) -> list[str]:
    """Modules in no room, imports of a room that stands further on, and imports of a face by its own floor."""
    found = [f"{module} is in no room" for module in edges if module not in ROOMS and room_of(module)[1] < 0]
    for module, imported in edges.items():
        for other in imported if module not in ROOMS else ():
            (floor, room), (theirs, place) = room_of(module), room_of(other)
            if floor == theirs and (other in ROOMS or place > room):
                found.append(f"{module} imports {other}")
    return found


def test_no_circle_of_imports() -> None:
    edges = imports(REPO)
    assert circles({module: others - set(ROOMS) for module, others in edges.items() if module not in ROOMS}) == []


def test_a_room_imports_what_stands_before_it() -> None:
    assert wrong_ways(imports(REPO)) == []
    rooms = {(floor, room.partition(".")[0]) for floor, names in ROOMS.items() for room in names.split()}
    assert [room for room in rooms if not list((REPO / room[0]).glob(f"{room[1]}*"))] == []


def test_folders_functions_and_the_command_line_are_small() -> None:
    assert heaps(REPO) == {}
    assert wide(REPO) == {}
    assert len((REPO / "cli.py").read_text().splitlines()) <= MOST_LINES


def test_wrong_ways_are_found() -> None:
    edges = {
        "store": {"store.cache"},
        "store.cache": {"store", "store.errors"},
        "store.format.shard": {"store.cache"},
        "classifiers.heads.solvers.softmax": {"classifiers.heads.fitted"},
        "classifiers.heads.fitted": {"classifiers.heads.solvers.softmax", "extractor.commands.console"},
        "extractor.anywhere": set(),
    }
    assert wrong_ways(edges) == [
        "extractor.anywhere is in no room",
        "store.cache imports store",
        "store.format.shard imports store.cache",
        "classifiers.heads.solvers.softmax imports classifiers.heads.fitted",
    ]


def test_the_rules_find_who_breaks_them(tmp_path: Path) -> None:
    """A planted circle (in a function, and for types), a thirteenth module, a ninth parameter."""
    for floor in FLOORS[:3]:
        (tmp_path / floor / "room").mkdir(parents=True)
        (tmp_path / floor / "__init__.py").touch()
    (tmp_path / "store/a.py").write_text("def f():\n    from .room import b\n")
    (tmp_path / "store/room/__init__.py").touch()
    (tmp_path / "store/room/b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import c\n")
    (tmp_path / "store/c.py").write_text("import store.a\n")
    (tmp_path / "store/d.py").write_text("from . import a\nfrom .room.b import name\n")
    assert imports(tmp_path)["store.d"] == {"store.a", "store.room.b"}
    assert circles(imports(tmp_path)) == [{"store.a", "store.c", "store.room.b"}]
    for i in range(MOST_MODULES + 1):
        assert heaps(tmp_path) == {}
        (tmp_path / f"extractor/room/m{i}.py").touch()
    assert heaps(tmp_path) == {"extractor.room": 13}
    signature = ", ".join(f"p{i}" for i in range(MOST_PARAMETERS + 1))
    many = f"class Head(BaseEstimator):\n    def __init__(self, {signature}): ...\n    def fit(self, {signature}): ...\n"
    (tmp_path / "classifiers/head.py").write_text(many + f"def eight({signature[:-4]}): ...\n")
    assert wide(tmp_path) == {"classifiers.head.Head.fit": 9}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    mine = FLOORS.index(floor_of(path))
    for line, top in upward(path.read_text(), mine):
        pytest.fail(f"line {line}: {floor_of(path)} imports {top}")


def upward(source: str, mine: int) -> Iterator[tuple[int, str]]:
    """Imports of a floor that is not below the ``mine``-th, with their lines."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        tops = {name.partition(".")[0] for name in names} & set(FLOORS)
        yield from ((node.lineno, top) for top in tops if FLOORS.index(top) > mine)


def test_a_planted_upward_import_is_found() -> None:
    source = "import os\nfrom store.format import hdf5\ndef f():\n    from classifiers.heads.registry import make_head\n"
    assert list(upward(source, FLOORS.index("extractor"))) == [(4, "classifiers")]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
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


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_the_command_line_prints_and_exits(path: Path) -> None:
    if path.name == "cli.py" or path.parent.name == "commands":
        return
    allowed = {("export.py", "print")}  # the answer of the export's child process
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = {alias.name for alias in node.names} | {getattr(node, "module", "")}
            assert "click" not in named, f"line {node.lineno}: click is for commands"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("print", "sys.exit", "exit", "quit"):
                assert (path.name, called) in allowed, f"line {node.lineno}: {called}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
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


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_variable_is_named_for_what_it_holds(path: Path) -> None:
    """And not for the fact that it was assigned."""
    empty = {"found", "given", "seen", "told", "got", "asked", "said"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assert node.id not in empty, f"line {node.lineno}: {node.id}"
        if isinstance(node, ast.arg):
            assert node.arg not in empty, f"line {node.lineno}: {node.arg}"


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
    context = click.Context(cli.cli)
    outer = {name: cli.cli.get_command(context, name) or pytest.fail(name) for name in cli.cli.list_commands(context)}
    groups = {name: command.commands for name, command in outer.items() if isinstance(command, click.Group)}
    return outer | {f"{group} {name}": command for group, members in groups.items() for name, command in members.items()}


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_begins_with_a_sentence_and_ends_with_an_example(name: str) -> None:
    text = inspect.cleandoc(commands()[name].help or "")
    assert text.split("\n\n")[0].rstrip().endswith(".")
    assert text.split("\n\n")[-1].startswith(f"Example: penult {name} ")


def test_the_table_of_commands_says_the_first_sentence_of_each() -> None:
    context = click.Context(cli.cli)
    for name, (_, summary) in (row for section in cli.COMMANDS.values() for row in section.items()):
        command = cli.cli.get_command(context, name)
        assert inspect.cleandoc(getattr(command, "help", "")).splitlines()[0] == summary
        assert len(summary) <= 60


def readme_commands() -> list[str]:
    text = "\n".join(page.read_text() for page in [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))])
    blocks = re.findall(r"```(?:console|sh|bash)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("penult ")]


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_in_the_readme_exists_with_its_flags(line: str) -> None:
    words = shlex.split(line.partition("#")[0].partition("|")[0].partition(">")[0])[1:]
    command = commands().get(" ".join(words[:2])) or (cli.cli if words[0].startswith("-") else commands()[words[0]])
    parameters = command.get_params(click.Context(command))
    known = {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}
    for word in words[1:]:
        if word.startswith("-") and not re.fullmatch(r"-?[\d.]+", word):
            assert word in known | {"--help"}, f"{word} in: {line}"


def test_the_documents_name_every_command_and_every_page() -> None:
    text = (REPO / "docs/commands.md").read_text()
    assert [name for name in commands() if f"penult {name}" not in text] == []
    pages = "\n".join(page.read_text() for page in [REPO / "README.md", *(REPO / "docs").glob("*.md")])
    names = {page.name for page in (REPO / "docs").glob("*.md")}
    assert names - set(re.findall(r"([\w-]+\.md)[)#]", pages)) == set()


@pytest.mark.parametrize("page", [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}#{anchor}"


def test_a_task_is_an_object_and_is_never_compared_by_its_name() -> None:
    """Outside of the modules that declare tasks and rows of heads and gates."""
    named = {"single-label", "multi-label", "regression"}
    constants = {"ONE_LABEL.name", "SingleLabelTask.name", "MultiLabelTask.name", "RegressionTask.name"}
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                if any(getattr(side, "value", None) in named or ast.unparse(side) in constants for side in sides):
                    found.append(f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
