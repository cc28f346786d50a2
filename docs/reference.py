"""The generated parts of the documentation: the keys of job files and the options of commands, from the models that check them;
and the layouts of images, from the matrix that tries them.

Run by ``make docs``; a test compares what is there with what this makes.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from benchmarks import layouts
from classifiers.jobs.job_file import keys_of, models
from extractor.commands.console import SettingsCommand
from extractor.settings import Settings, bounds_of, choices_of, face, flag_of, group_of, groups, is_list, kinds_of

DOCS = Path(__file__).resolve().parent
BEGIN, END = "<!-- made by docs/reference.py -->", "<!-- end -->"
KINDS = {bool: "true or false", str: "text", float: "number", int: "whole number"}


def expected(model: type[Settings], name: str) -> str:
    """What a setting may be, as one writes it in TOML or in Python."""
    if choices := choices_of(model, name):
        return ", ".join(f'`"{choice}"`' for choice in choices)
    kinds, look = kinds_of(model, name), face(model, name)
    found = next((text for kind, text in KINDS.items() if any(issubclass(each, kind) for each in kinds)), "text")
    if found == "text" and look.get("metavar"):
        found = f"`{look['metavar']}`"
    if look.get("metavar") == "SIZE":
        found = 'a size, such as `"4GB"`'
    if look.get("metavar") not in ("SIZE", None) or found != "text":
        found = ", ".join(filter(None, [found, bounds_of(model, name) if look.get("metavar") != "SIZE" else ""]))
    found += str(look.get("also", ""))
    return f"[{found}, ...]" if is_list(model, name) else found


def default(model: type[Settings], name: str, quote: str = '"') -> str:
    """What holds where nothing is said."""
    field = model.model_fields[name]
    if field.is_required():
        return "needed"
    if shown := face(model, name).get("shown"):
        return f"`{quote}{shown}{quote}`" if shown in choices_of(model, name) else str(shown)
    value = field.default
    if value is None or value == ():
        return ""
    return (
        f"`{value}`".lower()
        if isinstance(value, bool)
        else f"`{quote}{value}{quote}`"
        if isinstance(value, str)
        else f"`{value:g}`"
    )


def table(rows: list[tuple[str, ...]]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def job_keys() -> str:
    """The table of `docs/jobs.md`."""
    rows = [("key", "what it may be", "default", "meaning")]
    for section, model in models().items():
        for key, name in keys_of(section).items():
            text = str(model.model_fields[name].description)
            about = group_of(model, name).heading
            text = f"{about.removeprefix('Head: ')}: {text}" if about.startswith("Head: ") else text
            full = f"{section}.{key}" if section else key
            rows.append((f"`{full}`", expected(model, name), default(model, name), text))
    return table(rows)


def image_layouts() -> str:
    """The table of `docs/images.md`."""
    cells = list(layouts.cells())
    counts = Counter(cell.format for cell in cells)
    of = ", ".join(f"{count} of {name}" for name, count in counts.items())
    read = sum(cell.within > 0 for cell in cells)
    text = f"{len(cells)} files ({of}): {read} are read, {len(cells) - read} are refused as `unsupported_mode`."
    return f"{text}\n\n{table(layouts.summary())}"


def options_page() -> str:
    """The page `docs/options.md`."""
    parts = [
        "# Options",
        "Every setting of every command that has some, with its name in Python. Those of `extract` and `train` are keys of "
        "[job files](jobs.md), too. `penult COMMAND --help` says the same, and how to name outputs. Where several values are "
        "taken, `--layer` and `--target` are repeated, and the others have commas between them: `--few-shot 1,5,10`.",
    ]
    context = click.Context(cli.cli)
    for name in cli.cli.list_commands(context):
        command = cli.cli.get_command(context, name)
        if not isinstance(command, SettingsCommand):
            continue
        parts.append(f"## penult {name}\n\n{str(command.help).splitlines()[0]}")
        sections: dict[str, list[tuple[str, ...]]] = {}
        for group, names in groups(command.model, "cli"):
            for each in names:
                cells = (
                    f"`{', '.join(filter(None, [face(command.model, each).get('short'), flag_of(command.model, each)]))}`",
                    f"`{each}`",
                    expected(command.model, each),
                    default(command.model, each, ""),
                    str(command.model.model_fields[each].description),
                )
                sections.setdefault(group.heading, []).append(cells)
        for heading, rows in sections.items():
            parts.append(f"### {heading}\n\n{table([('flag', 'in Python', 'what it may be', 'default', 'meaning'), *rows])}")
    return "\n\n".join(parts) + "\n"


def with_part(page: str, part: str) -> str:
    """A page with its generated part replaced."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{rest.partition(END)[2]}"


def pages() -> dict[Path, str]:
    """Every generated page as it must be."""
    parts = {DOCS / "jobs.md": job_keys(), DOCS / "images.md": image_layouts()}
    filled = {path: with_part(path.read_text("utf-8"), part) for path, part in parts.items()}
    return filled | {DOCS / "options.md": options_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, "utf-8")
        click.echo(path)
