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
VERSION = 2  # of the rule by which `hash_rank_split` splits; a cache is split by the one it was made with
ROUNDING = 1e-9  # 0.2 * 15 is a little more than 3
TOLERATED = 0.05  # distance from the share that was asked for, of all samples, of which nothing is said


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


def hash_rank_split(
    labels: Sequence[str], groups: Sequence[bytes], *, val: float, test: float, seed: int = 0, version: int = VERSION
) -> list[str]:
    """Assign every sample to ``train``, ``val`` or ``test``.

    Groups are ordered by SHA-256(seed + group) within the class that most of their samples have. In this order test takes each
    group that still fits into ``test * n`` samples of the class, and val likewise of those that are left; the rest is train.
    Where a part of a group is missing, some classes take one more, their smallest, so that all classes together come nearest
    to the fraction; a digest decides which. Each split has a group of each class at least. So a share is off by less than a
    group, and adding one file to 20,000 moves a few samples; a seeded shuffle moves 7 % of them.

    Args:
        labels: the class of each sample (n).
        groups: the group of each sample (n), which stays in one split.
        val: fraction for validation, 0 to leave it out.
        test: fraction held out, 0 to leave it out.
        seed: another seed gives another split.
        version: of the rule; 1 takes groups in order until they hold ``ceil(fraction * n)`` samples or more.

    Raises:
        UsageError: the fractions leave nothing to train on.
        BadDataError: a class has too few groups for the requested splits, or is missing from one of them; names it.

    >>> from collections import Counter
    >>> from store.splits import hash_rank_split
    >>> sizes = {b"ann": 280, b"bob": 60, b"cat": 60}
    >>> groups = [name for name, size in sizes.items() for _ in range(size)]
    >>> sorted(Counter(hash_rank_split(["cloud"] * 400, groups, val=0.2, test=0.2)).items())
    [('test', 60), ('train', 280), ('val', 60)]
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
    left = {label: sorted(by_class[label], key=lambda group: (rank(group), group)) for label in sorted(by_class)}
    every = {label: [len(members[group]) for group in ranked] for label, ranked in left.items()}
    for order, (name, fraction) in enumerate(fractions):
        sizes = {label: [len(members[group]) for group in ranked] for label, ranked in left.items()}
        quotas = {label: fraction * sum(each) for label, each in every.items()}
        keep = len(fractions) - order  # a group of each class for each of those that follow
        if version == 1:
            chosen = {label: _until_full(sizes[label], math.ceil(quotas[label]), keep) for label in left}
        else:
            quotas = {label: quota * _supply(every[label], val, test) for label, quota in quotas.items()}
            lots = {label: int.from_bytes(rank(f"{name}:{label}".encode())[:8], "big") / 2**64 for label in left}
            chosen = _nearest(sizes, quotas, keep, lots)
        for label, places in chosen.items():
            for place in places:
                for i in members[left[label][place]]:
                    split[i] = name
            left[label] = [group for place, group in enumerate(left[label]) if place not in places]
    present = set(zip(labels, split, strict=True))
    for label in sorted(owners):
        missing = [name for name in names if (label, name) not in present]
        if missing:
            message = f"no group with class {label!r} is in {', '.join(missing)}; try another --seed, or larger fractions"
            raise BadDataError(message)
    return split


def _until_full(sizes: Sequence[int], quota: int, keep: int) -> set[int]:
    """The first groups that hold the quota together, whatever their size: the rule of version 1."""
    places = set[int]()
    taken = 0
    for place, size in enumerate(sizes[: max(len(sizes) - keep, 0)]):
        if taken >= quota:
            break
        places.add(place)
        taken += size
    return places


def _supply(sizes: Sequence[int], val: float, test: float) -> float:
    """How much of its quotas a class can fill with groups that are not larger than these, so that each gets its part."""
    total = sum(sizes)
    small = sum(size for size in sizes if size < 2 * max(val, test) * total)
    return min(1.0, small / ((val + test) * total))


def _nearest(
    sizes: Mapping[str, Sequence[int]], quotas: Mapping[str, float], keep: int, lots: Mapping[str, float]
) -> dict[str, set[int]]:
    """The groups of each class that one split takes.

    Args:
        sizes: of the groups of each class, in order.
        quotas: samples of each class to take.
        keep: number of groups of each class to leave.
        lots: a number from 0 to 1 for each class, evenly distributed, that decides which of them take one more.
    """
    chosen: dict[str, set[int]] = {}
    more = []  # classes that could take one group more: the higher the sooner, the class, the group
    total = 0
    for label, each in sizes.items():
        chosen[label], taken = set(), 0
        for place, size in enumerate(each):
            if taken + size <= quotas[label] + ROUNDING and len(chosen[label]) < len(each) - keep:
                chosen[label].add(place)
                taken += size
        left = [place for place in range(len(each)) if place not in chosen[label]]
        if len(left) > keep:
            smallest = min(left, key=lambda place: each[place])
            lack = (quotas[label] - taken) / each[smallest]
            if taken and lack > ROUNDING:
                more.append((lack - lots[label], label, smallest))
            elif not taken:
                chosen[label].add(smallest)
                taken = each[smallest]
        total += taken
    wanted = sum(quotas.values())
    for _, label, place in sorted(more, reverse=True):
        if abs(total + sizes[label][place] - wanted) >= abs(total - wanted) - ROUNDING:
            break
        chosen[label].add(place)
        total += sizes[label][place]
    return chosen


def hash_rank_rule(*, val: float, test: float, seed: int, version: int = VERSION) -> dict[str, Any]:
    """How `hash_rank_split` splits, as JSON; without a version it is the first."""
    return {"rule": "hash-rank", "val": val, "test": test, "seed": seed, **({"version": version} if version > 1 else {})}


def version_of(rule: Mapping[str, Any] | None) -> int:
    """The version of the rule by which a cache was split, so that it is split by it again; the newest if it was not."""
    return int(rule.get("version", 1)) if rule and rule.get("rule") == "hash-rank" else VERSION


def missed_shares(samples: Iterable[tuple[str, str]], *, val: float, test: float, version: int = VERSION) -> list[str]:
    """A sentence if a split is far from what was asked for, with the reason.

    Args:
        samples: label and split of each.
        val: fraction that was asked for validation.
        test: fraction that was asked to be held out.
        version: of the rule by which it was made.
    """
    classes: dict[str, Counter[str]] = defaultdict(Counter)
    for label, split in samples:
        classes[label][split] += 1

    def distance(have: Counter[str]) -> float:
        return max(abs(have[name] / have.total() - fraction) for name, fraction in (("val", val), ("test", test)))

    every = sum(classes.values(), Counter[str]())
    if not every or distance(every) <= TOLERATED:
        return []
    wanted = " and ".join(f"{fraction:.0%} {name}" for name, fraction in (("test", test), ("val", val)) if fraction)
    have = ", ".join(f"{every[name]} {name}" for name in ("train", "test", "val") if every[name])
    worst = max(sorted(classes), key=lambda label: distance(classes[label]))
    where = "" if len(classes) == 1 else f" (most of all of class {worst!r}: {sum(classes[worst].values())} samples)"
    why = "groups stay whole, and each split has at least one of each class"
    if version == 1:
        why = "the cache was split by an earlier rule, and --resplit comes nearer"
    return [f"{wanted} of {every.total()} samples were asked for, and the split is {have}: {why}{where}"]


def rule_text(rule: Mapping[str, Any]) -> str:
    """How a split was made, in words."""
    if rule.get("rule") == "hash-rank":
        again = f", version {rule['version']}" if "version" in rule else ""
        return f"by hash rank (val {rule['val']}, test {rule['test']}, seed {rule['seed']}{again})"
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


def assign_splits(
    rows: Sequence[Row], *, val: float, test: float, seed: int, stratify: bool = True, version: int = VERSION
) -> list[str]:
    """Hash-rank splits of rows, within each class if ``stratify``; groups and exact copies stay together."""
    labels = [row.label or "" for row in rows] if stratify else ["(all samples)"] * len(rows)
    return hash_rank_split(labels, groups_of(rows), val=val, test=test, seed=seed, version=version)


def with_splits(rows: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """The rows with their splits replaced."""
    return [row.with_split(name) for row, name in zip(rows, names, strict=True)]
