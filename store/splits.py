"""Train, validation and test splits by hash rank: reproducible, group-aware, and stable when files are added or removed."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from store.format.samples import Row

from .errors import BadDataError, UsageError, display

SHOWN = 10  # classes in a message; there can be thousands


def merge_groups(groups: Sequence[bytes], contents: Sequence[bytes]) -> list[bytes]:
    """Join samples that must stay in one split: those of one group, those of one content, and all that these connect.

    Args:
        groups: the group of each sample; empty means its content alone.
        contents: the content digest of each sample.

    Returns:
        One name for each connected set: the smallest of its groups, or its content if it has none.
    """
    if not any(groups):
        return list(contents)
    parent: dict[tuple[bool, bytes], tuple[bool, bytes]] = {}

    def find(node: tuple[bool, bytes]) -> tuple[bool, bytes]:
        root = node
        while parent.setdefault(root, root) != root:
            root = parent[root]
        while parent[node] != root:
            parent[node], node = root, parent[node]
        return root

    for group, content in zip(groups, contents, strict=True):
        a, b = find((True, content)), find((False, group) if group else (True, content))
        parent[max(a, b)] = min(a, b)  # groups sort before contents, so a set with groups is named by one
    return [find((True, content))[1] for content in contents]


def split_names(*, val: float, test: float) -> list[str]:
    """The names of the splits that the fractions request, train first.

    Raises:
        UsageError: the fractions leave nothing to train on.
    """
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        message = f"--val-fraction {val} and --test-fraction {test} leave nothing to train on; their sum must be below 1"
        raise UsageError(message)
    return ["train", *(["test"] if test else []), *(["val"] if val else [])]


def require_sizes(groups_per_class: Mapping[str, int], names: Sequence[str]) -> None:
    """Refuse classes that are too small to be in every split.

    Raises:
        BadDataError: classes have fewer distinct samples or groups than there are splits; names them all.
    """
    small = [(label, count) for label, count in sorted(groups_per_class.items()) if count < len(names)]
    if small:
        listed = ", ".join(f"class {label!r} has {count}" for label, count in small[:SHOWN])
        more = f" and {len(small) - SHOWN} more classes have too few" if len(small) > SHOWN else ""
        message = (
            f"{listed} distinct sample(s) or group(s){more}: too few for {', '.join(names)}. "
            f"Add samples, leave the class out, or ask for fewer splits (--val-fraction 0, --test-fraction 0)"
        )
        raise BadDataError(message)


def hash_rank_split(labels: Sequence[str], groups: Sequence[bytes], *, val: float, test: float, seed: int = 0) -> list[str]:
    """Assign every sample to ``train``, ``val`` or ``test``.

    Groups are ordered by SHA-256(seed + group) within the class that most of their samples have. From the front, groups go to
    test until they hold at least ``ceil(test * n)`` samples of the class, the next ones to val likewise, the rest to train. A
    group stays in one split. Adding one file to 20,000 moves at most a few samples; a seeded shuffle moves 7 % of them.

    Args:
        labels: the class of each sample (n).
        groups: the group of each sample (n), which stays in one split.
        val: fraction for validation, 0 to leave it out.
        test: fraction held out, 0 to leave it out.
        seed: another seed gives another split.

    Raises:
        UsageError: the fractions leave nothing to train on.
        BadDataError: a class has too few groups for the requested splits, or is missing from one of them; names it.
    """
    members: dict[bytes, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    prefix = f"{seed}:".encode()
    names = split_names(val=val, test=test)
    fractions = [(name, fraction) for name, fraction in (("test", test), ("val", val)) if fraction]
    owners: dict[str, int] = Counter(label for rows in members.values() for label in {labels[i] for i in rows})
    require_sizes(owners, names)

    def rank(key: bytes) -> bytes:
        return hashlib.sha256(prefix + key).digest()

    by_class: dict[str, list[bytes]] = defaultdict(list)
    for group, rows in members.items():
        if len(rows) == 1:
            by_class[labels[rows[0]]].append(group)
            continue
        votes = Counter(labels[i] for i in rows)
        # a tie is broken by hash; alphabetical order would always favour the same class
        by_class[min(votes, key=lambda label: (-votes[label], rank(group + label.encode())))].append(group)

    split = ["train"] * len(labels)
    for label in sorted(by_class):
        ranked = sorted(by_class[label], key=lambda group: (rank(group), group))
        total = sum(len(members[group]) for group in ranked)
        position = 0
        for order, (name, fraction) in enumerate(fractions):
            quota, reserved = math.ceil(fraction * total), len(fractions) - order  # one group each for those that follow
            taken = 0
            while taken < quota and position < len(ranked) - reserved:
                for i in members[ranked[position]]:
                    split[i] = name
                taken += len(members[ranked[position]])
                position += 1
    present = set(zip(labels, split, strict=True))
    for label in sorted(owners):
        missing = [name for name in names if (label, name) not in present]
        if missing:
            message = f"no group with class {label!r} is in {', '.join(missing)}; try another --seed, or larger fractions"
            raise BadDataError(message)
    return split


def rule_text(rule: Mapping[str, Any]) -> str:
    """How a split was made, in words."""
    if rule.get("rule") == "hash-rank":
        return f"by hash rank (val {rule['val']}, test {rule['test']}, seed {rule['seed']})"
    return {"source": "the data's own", "none": "none (no labels)"}.get(str(rule.get("rule")), str(rule.get("rule")))


def untrained_labels(samples: Iterable[tuple[str | None, str | None]]) -> list[str]:
    """A sentence for each class that is in ``val`` or ``test`` and not in ``train``.

    Args:
        samples: label and split of each; those without a split are ignored.
    """
    counts = Counter((label, split) for label, split in samples if label is not None and split)
    trained = {label for label, split in counts if split == "train"}
    where: dict[str, list[str]] = defaultdict(list)
    for (label, split), count in sorted(counts.items()):
        if trained and label not in trained:
            where[label].append(f"{split!r} ({count})")
    return [f"class {label!r} is in {' and '.join(places)} and not in 'train'" for label, places in where.items()]


def groups_of(rows: Sequence[Row]) -> list[bytes]:
    """The group of each row, which stays in one split; groups that hold a copy of the same image are joined."""
    return merge_groups([row.group for row in rows], [row.sha256 for row in rows])


def divided_groups(samples: Iterable[tuple[bytes, str]]) -> dict[str, list[str]]:
    """The groups that have samples in more than one part, and these parts.

    Args:
        samples: group and part of each; an empty group is none.
    """
    parts: dict[bytes, set[str]] = defaultdict(set)
    for group, part in samples:
        if group:
            parts[group].add(part)
    return {display(group): sorted(names) for group, names in sorted(parts.items()) if len(names) > 1}


def assign_splits(rows: Sequence[Row], *, val: float, test: float, seed: int, stratify: bool = True) -> list[str]:
    """Hash-rank splits of rows, within each class if ``stratify``; groups and exact copies stay together."""
    labels = [row.label or "" for row in rows] if stratify else ["(all samples)"] * len(rows)
    return hash_rank_split(labels, groups_of(rows), val=val, test=test, seed=seed)


def with_splits(rows: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """The rows with their splits replaced."""
    return [row.with_split(name) for row, name in zip(rows, names, strict=True)]
