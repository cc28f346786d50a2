"""Settings: one field gives type, bounds, default and help to the command line, job files and Python.

A command's settings are one flat model, made of groups that commands share. `Place` spells a setting as it is
written there, so that the same mistake gives the same message everywhere: ``--views is 0; expected 1 to 64`` on the
command line, ``extract.views is 0; expected 1 to 64`` of a job file, ``views is 0; expected 1 to 64`` in Python.

>>> from extractor.pipeline.settings import Options
>>> Options(views=0)
Traceback (most recent call last):
    ...
store.errors.UsageError: views is 0; expected 1 to 64
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from store.errors import PenultError, UsageError, did_you_mean

S = TypeVar("S", bound="Settings")
F = TypeVar("F", bound=Callable[..., Any])
RULES: set[str] = set()  # the qualified names of methods that are rules

EXPECTED = {  # pydantic's kinds of errors, in penult's words
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "path_type": "a path",
    "is_instance_of": "a path",
    "model_type": "a section of keys, such as [train]",
    "dict_type": "a section of keys, such as [train]",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length}",
    "byte_size": "a size such as 4GB",
    "byte_size_unit": "a size such as 4GB",
}
BOUNDS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}


@dataclass(frozen=True)
class Place:
    """A place where settings are written: the command line, a job file or Python.

    Attributes:
        spell: returns the name of a setting there.
        error: the exception for a wrong setting.
        folder: what paths are relative to.
    """

    spell: Callable[[type[Settings], str], str]
    error: type[PenultError] = UsageError
    folder: Path = Path()

    @contextmanager
    def here(self) -> Iterator[None]:
        """Check the settings inside the block as written here."""
        token = PLACE.set(self)
        try:
            yield
        finally:
            PLACE.reset(token)

    def explain(self, model: type[Settings], error: ValidationError) -> str:
        """All that pydantic found wrong, in penult's words."""
        return "; ".join(dict.fromkeys(self._explain(model, problem) for problem in error.errors()))

    def _explain(self, model: type[Settings], problem: Any) -> str:
        kind, context = problem["type"], problem.get("ctx", {})
        if not problem["loc"]:  # a rule about several settings
            return re.sub(r"<(\w+)>", lambda match: self.spell(model, match[1]), str(context.get("error", problem["msg"])))
        name = str(problem["loc"][0])
        if kind == "extra_forbidden":
            return f"there is no setting {name!r}" + did_you_mean(name, model.model_fields)
        if kind == "missing":
            return f"{self.spell(model, name)} is missing"
        expected = str(context["error"]) if kind == "value_error" else EXPECTED.get(kind, problem["msg"]).format(**context)
        if kind in BOUNDS:
            expected = bounds_of(model, name) or expected
        shown = json.dumps(problem["input"], default=str, ensure_ascii=False)
        return f"{self.spell(model, name)} is {shown}; expected {expected}{face(model, name).get('also', '')}"


def flag_of(model: type[Settings], name: str) -> str:
    """A setting as spelled on the command line, such as ``--batch-size``."""
    return str(face(model, name).get("flag") or f"--{name.replace('_', '-')}")


def key_of(model: type[Settings], name: str) -> str:
    """A setting as spelled in a job file, with its section, such as ``extract.batch_size``."""
    section = group_of(model, name).section
    key = str(face(model, name).get("key") or name)
    return f"{section}.{key}" if section else key


ARGUMENTS = Place(lambda _, name: name)
FLAGS = Place(flag_of)
PLACE = ContextVar("PLACE", default=ARGUMENTS)  # the place of the settings that are being checked


def setting(default: Any, text: str, *, only: str | None = None, **facts: Any) -> Any:
    """Declare a setting: a pydantic field, and how it looks.

    Args:
        default: its value if it is not set; ``...`` if it must be set.
        text: one sentence of help.
        only: ``python`` or ``cli`` if it is a setting in one of these places alone; jobs have those without ``only``.
        facts: bounds (``ge``, ``gt``, ``le``, ``lt``, ``min_length``), and how it looks: ``flag`` and ``short`` on the command
            line, ``key`` in a job, ``metavar``, ``shown`` (the default in words, if it is None), ``choices`` (a function),
            ``repeat`` (a flag that may come several times, instead of commas), ``also`` (what else is expected).
    """
    bounds = {name: facts.pop(name) for name in ("ge", "gt", "le", "lt", "min_length") if name in facts}
    return Field(default, description=text, json_schema_extra={"only": only, **facts}, **bounds)


def face(model: type[Settings], name: str) -> dict[str, Any]:
    """The looks of a setting: the ``facts`` of `setting`, and ``only``."""
    extra = model.model_fields[name].json_schema_extra if name in model.model_fields else None
    return extra if isinstance(extra, dict) else {}


def group_of(model: type[Settings], name: str) -> type[Settings]:
    """The group that declares a setting: its heading in the help, its section in a job."""
    return next(each for each in model.__mro__ if name in inspect.get_annotations(each))


def groups(model: type[Settings], place: str) -> Iterator[tuple[type[Settings], list[str]]]:
    """The groups of a model in order, each with its settings that ``place`` has: ``cli``, ``job`` or ``python``."""
    for group in model.__mro__:
        own = [name for name in inspect.get_annotations(group) if name in model.model_fields]
        names = [name for name in own if group_of(model, name) is group and face(model, name).get("only") in (None, place)]
        if names and issubclass(group, Settings):
            yield group, names


def is_list(model: type[Settings], name: str) -> bool:
    """Whether a setting holds several values."""
    return any(get_origin(each) is tuple for each in _alternatives(model.model_fields[name].annotation))


def kinds_of(model: type[Settings], name: str) -> set[type]:
    """The types of the single values of a setting."""
    return set(_kinds(model.model_fields[name].annotation))


def choices_of(model: type[Settings], name: str) -> tuple[Any, ...]:
    """The choices of a setting; empty if it is not a choice."""
    if "choices" in face(model, name):
        return tuple(face(model, name)["choices"]())
    literals = (each for each in _alternatives(model.model_fields[name].annotation) if get_origin(each) is Literal)
    return tuple(choice for each in literals for choice in get_args(each))


def bounds_of(model: type[Settings], name: str) -> str:
    """The range of a number, such as ``1 to 64``; empty if it has no bounds."""
    metadata = model.model_fields[name].metadata
    bounds = {
        kind: getattr(each, kind) for each in metadata for kind in BOUNDS.values() if getattr(each, kind, None) is not None
    }
    if {"ge", "le"} == bounds.keys():
        return f"{bounds['ge']:.10g} to {bounds['le']:.10g}"
    words = {"gt": "more than {:.10g}", "ge": "{:.10g} or more", "lt": "less than {:.10g}", "le": "at most {:.10g}"}
    return ", ".join(text.format(bounds[kind]) for kind, text in words.items() if kind in bounds)


def _alternatives(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Literal, tuple) or not get_args(annotation):
        yield annotation
    else:
        for each in get_args(annotation)[: 1 if get_origin(annotation) is Annotated else None]:
            yield from _alternatives(each)


def _kinds(annotation: Any) -> Iterator[type]:
    for each in _alternatives(annotation):
        if get_origin(each) is Literal:
            yield from map(type, get_args(each))
        elif get_origin(each) is tuple:
            yield from _kinds(get_args(each)[0])
        elif isinstance(each, type) and each is not type(None):
            yield each


def from_text(model: type[Settings], name: str, text: str) -> Any:
    """Parse text from the command line into the value of a job file: a number, or a list separated by commas.

    >>> from extractor.backbones.settings import OnnxInputSettings
    >>> from extractor.pipeline.settings import Options
    >>> from_text(Options, "batch_size", "16"), from_text(OnnxInputSettings, "mean", "0.4,0.5,0.6")
    (16, (0.4, 0.5, 0.6))
    """
    kinds = kinds_of(model, name)
    if is_list(model, name) and not face(model, name).get("repeat"):
        return tuple(_number(part, kinds) for part in text.split(","))
    return _number(text, kinds)


def _number(text: str, kinds: set[type]) -> Any:
    if not any(issubclass(kind, int | float) and kind is not bool for kind in kinds):
        return text
    if re.fullmatch(r"\s*[+-]?[0-9]{1,99}\s*", text):
        return int(text)
    try:
        return float(text) if text.isascii() else text
    except ValueError:
        return text


def rule(method: F) -> F:
    """Mark a method that refuses settings that do not fit each other, with a ValueError that calls them ``<name>``."""
    RULES.add(method.__qualname__)
    return method


def _rules(model: type[Settings]) -> list[Callable[[Any], None]]:
    methods = [each for kind in model.__mro__ for each in vars(kind).values() if isinstance(each, FunctionType)]
    return [method for method in methods if method.__qualname__ in RULES]


class Settings(BaseModel):
    """Settings of a command, or a group of them. Immutable; `replace` returns a changed copy.

    Raises:
        UsageError: names the setting, what it is and what was expected (in a job file, a JobFileError).
    """

    # strict: "8" is not 8; extra keys are errors, because a misspelt one would silently keep the default
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)
    section: ClassVar[str] = ""
    heading: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """List the settings in the docstring, for ``help`` and notebooks."""
        listed = "".join(f"    {name}: {field.description}\n" for name, field in cls.model_fields.items())
        cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or cls.__name__)}\n\nSettings:\n{listed}"

    @model_validator(mode="before")
    @classmethod
    def _no_empty_text(cls, settings: Any) -> Any:
        """Refuse empty text, and text with a zero byte: both are mistakes in every setting."""
        for name, value in settings.items() if isinstance(settings, dict) else ():
            for each in value if isinstance(value, list | tuple) else [value]:
                if isinstance(each, str) and (not each.strip() or "\0" in each):
                    message = f"<{name}> is {json.dumps(each)}; expected text that is not empty"
                    raise ValueError(message)
        return settings

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        problems: list[str] = []
        missing: list[PenultError] = []
        for method in _rules(type(self)):
            try:
                method(self)
            except ValueError as error:
                problems.append(str(error))
            except PenultError as error:  # a missing file has an exit code of its own
                missing.append(error)
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))
        if missing:
            raise missing[0]
        return self

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            place = PLACE.get()
            raise place.error(place.explain(type(self), error)) from None

    @classmethod
    def read(cls, settings: Mapping[str, Any], place: Place) -> Self:
        """Settings as written in a place."""
        with place.here():
            return cls(**settings)

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed."""
        return type(self)(**{**self.explicit(), **changes})

    def explicit(self) -> dict[str, Any]:
        """The settings that were set, as opposed to left at their defaults."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    def part(self, kind: type[S]) -> S:
        """One of the groups that these settings are made of."""
        return kind(**{name: value for name, value in self.explicit().items() if name in kind.model_fields})


MAX_SEED = 2**32 - 1


def seed_setting(text: str) -> Any:
    """Declare a seed; ``text`` says of what."""
    return setting(0, text, ge=0, le=MAX_SEED, metavar="N")


def as_tuple(value: Any) -> Any:
    """A list, or a single value, as a tuple; anything else stays as it is, to be refused by the field's type."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int | float | str) and not isinstance(value, bool) else value


def _path(value: Any) -> Any:
    return PLACE.get().folder / value if isinstance(value, str | Path) else value


Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
ResultPath = Annotated[Path, BeforeValidator(_path)]
FilePath = Annotated[Path | None, BeforeValidator(_path)]
