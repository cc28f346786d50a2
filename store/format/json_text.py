"""JSON according to RFC 8259: null in place of NaN and infinity, which Python would write as bare words; and its shape."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

WORDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` with its options, for lists, tuples and dictionaries of plain values.

    >>> dumps({"r2": float("nan"), "n": 3})
    '{"r2": null, "n": 3}'
    """
    return json.dumps(_numbers(value), allow_nan=False, **options)


def _numbers(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(each) for each in value]
    return value


def misfit(value: Any, shape: Any, name: str = "") -> str:
    """How JSON from an untrusted file differs from what its reader relies on, in words; empty if it fits.

    Args:
        value: as `json.loads` returns it.
        shape: a type (``float`` is any finite number, ``object`` anything); None; a list with the shape of each element, or
            with those of two or more elements, which then are all; a dictionary of the keys that are read, those that end in
            ``?`` optional, and ``*`` for all others; or a tuple of shapes, one of which must fit.
        name: of the value, for the words.

    >>> misfit({"n": "3"}, {"n": int, "note?": str})
    "'n' is text; expected a whole number"
    """
    if isinstance(shape, tuple):
        reasons = [misfit(value, each, name) for each in shape]
        return "" if "" in reasons else reasons[0]
    if isinstance(shape, dict):
        return _misfit(value, dict, name) or _misfit_inside(value, shape, name)
    if isinstance(shape, list):
        return _misfit(value, list, name) or _misfit_elements(value, shape, name)
    return _misfit(value, type(None) if shape is None else shape, name)


def _misfit(value: Any, kind: type, name: str) -> str:
    if kind is object:
        return ""
    if kind is float and type(value) in (int, float):
        fits = abs(value) <= sys.float_info.max  # not true of NaN, nor of a whole number that is larger
        return "" if fits else f"{name!r} is not finite"
    actual = type(value)
    if actual is kind:
        return "" if kind is not int or abs(value) < 2**63 else f"{name!r} is too large"
    what = "a number" if actual in (int, float) and kind is not int else WORDS.get(actual, str(actual))
    return f"{name!r} is {what}; expected {WORDS[kind]}" if name else f"it is {what}; expected {WORDS[kind]}"


def _misfit_elements(value: list[Any], shape: list[Any], name: str) -> str:
    """The first element that does not fit, or their number."""
    if len(shape) > 1 and len(value) != len(shape):
        return f"{name!r} has {len(value)} elements; expected {len(shape)}"
    shapes = shape if len(shape) > 1 else shape * len(value)
    reasons = (misfit(each, inner, f"{name}[{i}]") for i, (each, inner) in enumerate(zip(value, shapes, strict=True)))
    return next(filter(None, reasons), "")


def _misfit_inside(value: Mapping[str, Any], shape: Mapping[str, Any], name: str) -> str:
    """The first key that is missing, or whose value does not fit."""
    prefix = f"{name}." if name else ""
    known = {key.removesuffix("?") for key in shape}
    for key, inner in shape.items():
        bare = key.removesuffix("?")
        if key == "*":
            names = [each for each in value if each not in known]
        elif bare in value:
            names = [bare]
        elif bare == key:
            return f"{prefix + bare!r} is missing"
        else:
            continue
        for each in names:
            if reason := misfit(value[each], inner, prefix + each):
                return reason
    return ""
