"""JSON according to RFC 8259, with null in place of NaN and infinity, which Python would write as bare words."""

from __future__ import annotations

import json
import math
from typing import Any


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
