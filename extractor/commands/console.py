"""Shared parts of all commands: click options made from settings, ``-q`` and ``-v``, and printing of results.

Importing pydantic takes a twentieth of a second, so a command names its model as text, and only the command that runs, or whose
help is shown, imports it.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from store.errors import printable
from store.format import json_text
from store.progress.stages import Stage
from store.progress.terminal import BAR

if TYPE_CHECKING:
    from extractor.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path, readable=False)  # the command itself reports what cannot be read, with its own exit code
WITH_FAILURES = 3
OUTPUT, MESSAGES = "Output", "Messages"  # headings of options that are not settings
HEADINGS = dict.fromkeys(("--log-json", "--metrics", "--quiet", "--verbose", "--help"), MESSAGES) | {"--backbone": "Backbone"}


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, in the order of the help text."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


observing_options = options(
    click.option("--log-json", type=FOLDER, help="Append every message as one JSON object per line; the last is `summary`."),
    click.option("--metrics", type=FOLDER, help="Write a Prometheus textfile (.prom), replaced whole."),
    click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
)
one_layer_option = click.option("--layer", metavar="NAME", help="Which feature set, if the cache has several.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")


def output_option(what: str) -> Callable[[F], F]:
    return click.option("-o", "--output", required=True, type=FOLDER, help=what)


class _StderrHandler(logging.Handler):
    """Messages for people; warnings are marked, printed once each, and kept for `print_json`."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.warnings: dict[str, None] = {}  # in order

    def emit(self, record: logging.LogRecord) -> None:
        text, is_warning = record.getMessage(), record.levelno >= logging.WARNING
        if is_warning and text in self.warnings:  # the samples were listed again
            return
        if is_warning:
            self.warnings[text] = None
        say(f"warning: {text}" if is_warning else text, err=True)


def _set_loudness(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click calls it so
    """Set what goes to stderr; ``-q`` and ``-v`` mean the same before and after the command."""
    key = f"penult.{parameter.name}"
    ctx.meta[key] = value or ctx.meta.get(key, False)  # one dictionary for the whole command line
    quiet, verbose = (ctx.meta.get(f"penult.{name}") for name in ("quiet", "verbose"))
    logger = logging.getLogger("penult")
    logger.setLevel(logging.DEBUG)
    logger.handlers = [_StderrHandler(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)]


def loudness() -> list[click.Option]:
    """``-q`` and ``-v``, which every command takes."""
    facts: dict[str, Any] = {"is_flag": True, "expose_value": False, "callback": _set_loudness}
    return [
        click.Option(["-q", "--quiet"], help="Only warnings on stderr.", **facts),
        click.Option(["-v", "--verbose"], help="More on stderr.", **facts),
    ]


class Command(click.Command):
    """A command that takes ``-q`` and ``-v``."""

    def __init__(self, *arguments: Any, **facts: Any) -> None:
        super().__init__(*arguments, **facts)
        self.params += loudness()

    def invoke(self, ctx: click.Context) -> Any:
        with Stage(f"running {ctx.command_path}", bar=False, quiet=bool(ctx.meta["penult.quiet"])):
            return super().invoke(ctx)


class CommandGroup(click.Group):
    """Commands in the order in which they are declared."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class SettingsOption(click.Option):
    """One setting, as a flag."""

    def __init__(self, *names: str, heading: str, **facts: Any) -> None:
        super().__init__(list(names), **facts)
        self.heading = heading


class SettingsCommand(Command):
    """A command with options in sections; those of its model come first, and the function gets them as ``settings``.

    Args:
        model: ``module:name`` of a class of settings, or of a function that returns one.
        leave: settings that are arguments of the command instead.
    """

    def __init__(self, *arguments: Any, model: str, leave: Sequence[str] = (), **facts: Any) -> None:
        super().__init__(*arguments, **facts)
        self._model, self._leave = model, tuple(leave)

    @property
    def model(self) -> type[Settings]:
        module, _, name = self._model.partition(":")
        target: Any = getattr(importlib.import_module(module), name)
        return target if isinstance(target, type) else target()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*options_of(self.model, self._leave), *super().get_params(ctx)]

    def settings(self, ctx: click.Context) -> Settings:
        """The typed settings, removed from the parameters of a context and validated.

        Raises:
            UsageError: a value is wrong; names the flags.
        """
        from extractor.settings import FLAGS

        names = [*(str(option.name) for option in options_of(self.model, self._leave)), *self._leave]
        typed = {name: ctx.params.pop(name) for name in names}
        return self.model.read({name: value for name, value in typed.items() if value is not None and value != ()}, FLAGS)

    def invoke(self, ctx: click.Context) -> Any:
        ctx.params["settings"] = self.settings(ctx)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            heading = getattr(parameter, "heading", HEADINGS.get(parameter.opts[-1], OUTPUT))
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                sections.setdefault(heading, []).append(record)
        for heading in sorted(sections, key=lambda heading: heading in (OUTPUT, MESSAGES)):
            with formatter.section(heading):
                records = sorted(sections[heading], key=lambda record: not record[1].endswith("[required]"))
                formatter.write_dl(records, col_max=34)


@cache
def options_of(model: type[Settings], leave: tuple[str, ...] = ()) -> tuple[SettingsOption, ...]:
    """The settings of a model as click options, in sections."""
    from extractor.settings import groups

    sections: dict[str, list[SettingsOption]] = {}
    for group, names in groups(model, "cli"):
        group_options = [_option(model, name, group.heading) for name in names if name not in leave]
        sections.setdefault(group.heading, []).extend(group_options)
    return tuple(option for each in sections.values() for option in each)


def _option(model: type[Settings], name: str, heading: str) -> SettingsOption:
    from extractor.settings import choices_of, face, flag_of, from_text, is_list, kinds_of

    field, look, flag = model.model_fields[name], face(model, name), flag_of(model, name)
    plain = field.default is None or isinstance(field.default, bool | tuple)  # there is no default to show
    shown = look.get("shown") or (
        "" if plain else f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
    )
    ending = "  [required]" if field.is_required() else f"  [default: {shown}]" if shown else ""
    facts: dict[str, Any] = {"help": f"{field.description}{ending}", "heading": heading, "default": None}
    if kinds_of(model, name) == {bool}:
        flags = f"{flag}/--no-{flag.removeprefix('--')}" if field.default is True else flag
        return SettingsOption(name, flags, is_flag=True, **facts)
    many = is_list(model, name) and bool(look.get("repeat"))

    class Text(click.ParamType[Any]):
        """The typed text, with numbers as numbers; the model validates it."""

        name = "text"

        def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
            return from_text(model, setting_name, value) if isinstance(value, str) else value

    setting_name, choices = name, choices_of(model, name)
    metavar = look.get("metavar") or ("|".join(map(str, choices)) if choices else None)
    short = [look["short"]] if "short" in look else []
    return SettingsOption(name, *short, flag, type=Text(), multiple=many, metavar=metavar, **facts)


def say(text: str = "", *, err: bool = False, keep: str = "\t") -> None:
    """Print a line for people. Control characters are escaped, because names come from files: a label may clear the screen.

    Args:
        text: the line.
        err: on stderr.
        keep: characters that are printed as they are; with the newline, of a text of several lines.
    """
    with BAR.cleared():
        try:
            click.echo(printable(text, keep), err=err)
        except OSError as error:
            if not err or isinstance(error, BrokenPipeError):
                raise
            # The disk of the log is full: what a command has to say is not worth its work.


def say_text(text: str) -> None:
    """`say` a text of several lines."""
    say(text, keep="\n\t")


def is_quiet() -> bool:
    return bool(click.get_current_context().meta["penult.quiet"])


def print_json(facts: Any) -> None:
    """Print the result of a command; an object gets ``warnings``, the text of all that were logged, in order."""
    if isinstance(facts, dict):
        handlers = logging.getLogger("penult").handlers
        texts = [text for handler in handlers if isinstance(handler, _StderrHandler) for text in handler.warnings]
        facts = {**facts, "warnings": texts}
    click.echo(json_text.dumps(facts, indent=2))


def table_width() -> int | None:
    """How wide tables may be: a terminal knows it itself; a pipe or a file gets 160 characters."""
    return None if sys.stdout.isatty() else 160


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    from extractor.text_table import table

    click.echo(table(columns, rows, left=left, width=table_width()))


def print_preview(would: dict[str, Any], *, as_json: bool) -> None:
    """Print what a run would do."""
    if as_json:
        return print_json(would)
    say(f"{would['inputs']} inputs: {would['unchanged']} unchanged, {would['to_read']} to read (dry run, nothing done)")
    return say(f"train: {would['train']}") if "train" in would else None
