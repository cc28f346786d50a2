"""Commands of click whose options are settings: made from a model when they are asked for, and handed on as one.

Importing pydantic takes a twentieth of a second, so a command names its model as text, and only the command that runs, or whose
help is shown, imports it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from extractor.settings.declaration import Settings

F = TypeVar("F", bound=Callable[..., Any])
OUTPUT, MESSAGES = "Output", "Messages"  # headings of options that are no settings
HEADINGS = dict.fromkeys(("--log-json", "--metrics", "--quiet", "--verbose", "--help"), MESSAGES) | {"--backbone": "Backbone"}


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, in the order of the help text."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


class SettingsOption(click.Option):
    """One setting, as a flag."""

    def __init__(self, *names: str, heading: str, **facts: Any) -> None:
        super().__init__(list(names), **facts)
        self.heading = heading


class SettingsCommand(click.Command):
    """A command with options in sections; those of its model come first, and the function gets them as ``settings``.

    Args:
        model: ``module:name`` of a class of settings, or of a function that gives one.
        leave: settings that are arguments of the command instead.
    """

    def __init__(self, *arguments: Any, model: str, leave: Sequence[str] = (), **facts: Any) -> None:
        super().__init__(*arguments, **facts)
        self._model, self._leave = model, leave

    @property
    def model(self) -> type[Settings]:
        module, _, name = self._model.partition(":")
        found: Any = getattr(importlib.import_module(module), name)
        return found if isinstance(found, type) else found()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*options_of(self.model, self._leave), *super().get_params(ctx)]

    def settings(self, ctx: click.Context) -> Settings:
        """What was typed, taken out of the parameters of a context.

        Raises:
            UsageError: it is wrong; names the flags.
        """
        from extractor.settings.declaration import FLAGS

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


def options_of(model: type[Settings], leave: Sequence[str] = ()) -> list[SettingsOption]:
    """The settings of a model as options of click, in sections."""
    from extractor.settings.declaration import groups

    sections: dict[str, list[SettingsOption]] = {}
    for group, names in groups(model, "cli"):
        found = [_option(model, name, group.heading) for name in names if name not in leave]
        sections.setdefault(group.heading, []).extend(found)
    return [option for each in sections.values() for option in each]


def _option(model: type[Settings], name: str, heading: str) -> SettingsOption:
    from extractor.settings.declaration import choices_of, face, flag_of, from_text, is_list, kinds_of

    field, look, flag = model.model_fields[name], face(model, name), flag_of(model, name)
    plain = field.default is None or isinstance(field.default, bool | tuple)  # nothing that needs saying
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
        """What was typed, with numbers as numbers; the model refuses what is wrong."""

        name = "text"

        def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
            return from_text(model, setting_name, value) if isinstance(value, str) else value

    setting_name, choices = name, choices_of(model, name)
    metavar = look.get("metavar") or ("|".join(map(str, choices)) if choices else None)
    short = [look["short"]] if "short" in look else []
    return SettingsOption(name, *short, flag, type=Text(), multiple=many, metavar=metavar, **facts)
