"""Fingerprints: everything that decides the features in a cache, compared field by field."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.progress.stages import Stage

from .errors import CorruptCacheError, FingerprintMismatchError, InputMissingError, display

VIEWS = "views"  # the field with how the views of an image were drawn; absent if there is one view
MAX_VIEWS = 64  # decoded images wait in memory with all their views


@dataclass(frozen=True)
class Fingerprint:
    """Named facts (JSON values; nested objects are compared leaf by leaf). Equal fingerprints mean comparable features.

    >>> from store import Fingerprint
    >>> Fingerprint({"layer": "a"}).differences(Fingerprint({"layer": "b"}))
    {'layer': ('a', 'b')}
    """

    fields: Mapping[str, Any]

    @property
    def canonical(self) -> str:
        """The fields as canonical JSON: sorted keys, no spaces, as stored in every shard."""
        return json.dumps(self.fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @property
    def key(self) -> str:
        """SHA-256 of `canonical`, as 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    @property
    def views(self) -> int:
        """How many views of each image there are."""
        drawn = self.fields.get(VIEWS)
        return int(drawn["count"]) if isinstance(drawn, Mapping) else 1

    @property
    def single(self) -> Fingerprint:
        """The fingerprint of the first view alone, which is the image without augmentation."""
        return Fingerprint({name: value for name, value in self.fields.items() if name != VIEWS})

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """Read `canonical` back.

        Raises:
            CorruptCacheError: it is not a JSON object.
        """
        try:
            fields = json.loads(text)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            message = f"not a fingerprint: {text[:80]!r}"
            raise CorruptCacheError(message)
        return cls(fields)

    def leaves(self) -> dict[str, Any]:
        """Every fact by its dotted name, such as ``pixels.crop``."""
        return dict(_leaves("", self.fields))

    def differences(self, other: Fingerprint, ignore: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
        """The dotted names whose values differ, each with (mine, theirs); absent is None."""
        mine, theirs = self.leaves(), other.leaves()
        return {
            name: (mine.get(name), theirs.get(name))
            for name in sorted({*mine, *theirs})
            if name not in ignore and mine.get(name) != theirs.get(name)
        }

    def require(self, other: Fingerprint, *, mine: str, theirs: str, ignore: Collection[str] = ()) -> None:
        """Refuse to combine two things whose fingerprints differ.

        Args:
            other: the fingerprint that must agree with this one.
            mine: what this fingerprint belongs to, for the message.
            theirs: what the other belongs to.
            ignore: dotted names that may differ.

        Raises:
            FingerprintMismatchError: names every field that differs.
        """
        differences = self.differences(other, ignore)
        if differences:
            listing = "; ".join(f"{name}: {short(a)} against {short(b)}" for name, (a, b) in differences.items())
            message = f"{mine} and {theirs} do not go together. They differ in {listing}"
            raise FingerprintMismatchError(message)


def require_same(ours: Sequence[Fingerprint], others: Sequence[Fingerprint], *, mine: str, theirs: str) -> None:
    """Refuse to combine two things whose feature sets, in their order, have different fingerprints.

    Args:
        ours, others: the fingerprint of each feature set.
        mine, theirs: what they belong to, for the message.

    Raises:
        FingerprintMismatchError: names every field that differs, or the layers.
    """
    if len(ours) != len(others):
        here, there = (", ".join(str(each.fields.get("layer")) for each in sets) for sets in (ours, others))
        message = f"{mine} holds features of {here}, {theirs} gives those of {there}; use a new cache"
        raise FingerprintMismatchError(message)
    for a, b in zip(ours, others, strict=True):
        a.require(b, mine=mine, theirs=theirs)


def file_digest(*paths: Path) -> str:
    """SHA-256 of a file, hexadecimal; of several files, the SHA-256 of their digests in this order.

    Raises:
        InputMissingError: one cannot be read.
    """
    parts = []
    for path in paths:
        try:
            with Stage(f"reading {display(os.fsencode(path.name))}"), path.open("rb") as file:
                parts.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            message = f"cannot read {path}: {error.strerror}"
            raise InputMissingError(message) from error
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def short(value: Any) -> str:
    """A value shortened for a message: a digest becomes its first twelve digits."""
    text = value if isinstance(value, str) else json.dumps(value)
    is_digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return f"{text[:12]}.." if is_digest else text


def _leaves(prefix: str, node: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in node.items():
        if isinstance(value, Mapping):
            pairs += _leaves(f"{prefix}{name}.", value)
        else:
            pairs.append((prefix + name, value))
    return pairs
