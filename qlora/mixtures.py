"""Several datasets as one: joined, or mixed by weights."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from decimal import Decimal

import numpy as np

from qlora.cli import require
from qlora.lazy_rows import LazyRows

WEIGHTED = re.compile(r"(.+):(\d+\.?\d*|\.\d+)", re.S)
KINDS = {"labels": "labelled texts", "chat": "conversations", "pairs": "pairs of replies", "text": "texts"}


def read_parts(names: Sequence[str]) -> list[tuple[str, float | None]]:
    """["imdb:0.7", "my.csv:0.3"] -> [("imdb", 0.7), ("my.csv", 0.3)]; the weight is None where none is given.

    Raises UsageError unless all or none have one.
    """
    parts, said = [], f"--dataset {' '.join(names)}"
    for name in names:
        match = None if os.path.exists(name) else WEIGHTED.fullmatch(name)
        parts.append((match[1], float(match[2])) if match else (name, None))
    weights = [weight for _, weight in parts if weight is not None]
    require(bool(parts), "--dataset: name one, or several")
    require(len(weights) in (0, len(parts)), f"{said}: give each of them a weight, or none")
    require(all(weight > 0 for weight in weights), f"{said}: weights must be above 0")
    require(
        len(parts) > 1 or not weights, f"{said}: a weight is a share beside others; name one more, or none"
    )
    twice = [name for i, (name, _) in enumerate(parts) if name in [n for n, _ in parts[:i]]]
    require(not twice, f"{said}: {', '.join(twice)} is named twice; give it a larger weight instead")
    return parts


def names_of(parts: Iterable[dict]) -> tuple[str, ...]:
    """What read_parts() reads, of qlora.json's notes: [{"name": "imdb", "weight": 0.7}] -> ("imdb:0.7",)"""
    return tuple(p["name"] + (f":{Decimal(repr(p['weight'])):f}" if p.get("weight") else "") for p in parts)


def joined(parts: Sequence, weighted: bool):
    """One data.RowSet of several, without the rows that an earlier part has, too.

    With weights the parts stay apart, since each gives its share. Raises UsageError where they don't fit
    together.
    """
    check_alike(parts)
    own = [bool(len(part.held_out)) for part in parts]
    split_alone = f"{parts[own.index(True)].name} has a test split of its own" if any(own) else ""
    said = f"--dataset: {split_alone}, {parts[own.index(False)].name} has none" if not all(own) else ""
    require(weighted or all(own) or not any(own), f"{said}; give them weights, NAME:0.5 say, to join them")
    before = sum(len(part.rows) + len(part.held_out) for part in parts)
    seen = np.zeros(0, np.uint64)
    kept: dict[str, list[LazyRows]] = {"rows": [], "held_out": []}
    for side, found in kept.items():  # training rows first: a row of both is none to score
        for part in parts:
            rows = LazyRows.of(getattr(part, side))
            found.append(rows.only(~np.isin(rows.hashes, seen)))
            seen = np.concatenate([seen, found[-1].hashes])
    for part, rows in zip(parts, kept["rows"]):
        require(bool(len(rows)), f"--dataset {part.name}: every row of it is in the others, too")
    parts = [replace(p, rows=r, held_out=h) for p, r, h in zip(parts, kept["rows"], kept["held_out"])]
    total = sum(part.weight for part in parts)
    shares = [f"{part.weight / total:.0%} " if weighted else "" for part in parts]
    return replace(
        parts[0],
        rows=LazyRows.joined(kept["rows"]),
        held_out=LazyRows.joined(kept["held_out"]),
        origin=" + ".join(share + part.origin for share, part in zip(shares, parts)),
        duplicates_removed=sum(p.duplicates_removed for p in parts) + before - len(seen),
        left_out={f"{p.name}: {reason}": where for p in parts for reason, where in p.left_out.items()},
        parts=tuple(parts) if weighted else (),
        weight=1.0,
    )


def check_alike(parts: Sequence) -> None:
    """Raises UsageError unless all parts are of one kind and have the same answers."""
    first = parts[0]
    for part in parts[1:]:
        kinds = [KINDS.get(p.kind, p.kind) for p in (first, part)]
        both = f"--dataset: {first.name} holds {kinds[0]}, {part.name} {kinds[1]}"
        require(part.kind == first.kind, f"{both}; all parts must be of one kind")
        answers = [", ".join(p.answers) for p in (first, part)]
        both = f"--dataset: {first.name} has the answers {answers[0]}, {part.name} {answers[1]}"
        require(part.answers == first.answers, f"{both}; all parts must have the same labels")
