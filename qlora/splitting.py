"""Which rows are trained on, which are held out: by seed, evenly from each label, from each part by weight.

Held-out rows are drawn first and one after the other, so that a run of another size is scored on the same.
"""

from collections.abc import Sequence

import numpy as np
import torch

from config import EVAL_SAMPLES, SAMPLES
from qlora.cli import UsageError, note, require
from qlora.lazy_rows import labels_of


def split(found, samples: int | None, eval_samples: int | None, seed: int) -> tuple[list, list]:
    """(training rows, held-out rows) of a data.RowSet.

    None: config's default, or fewer where there are fewer, which a note says. Raises UsageError where more
    was asked for than there is.
    """
    parts = found.parts or (found,)
    train, held = sizes(found, samples, eval_samples)
    exams = [held.count(i) for i in range(len(parts))]
    if found.kind == "pairs":
        drawn, lost = draw_pairs(parts, exams, seed)
        wanted, left = len(train), [len(rows) for rows, _ in drawn]
        train = turns(wanted, [part.weight for part in parts], left)
        shared = f"{lost} pairs share a prompt with a held-out one"
        if lost:
            note(f"note       not trained on: {shared}")
        fits = len(train) == wanted if samples is not None else len(train) > 0
        asked = f"--samples {samples}: " if samples is not None else "--dataset: "
        require(fits, f"{asked}{len(train)} pairs are left for training ({shared})")
    counts = [(train.count(i), n) for i, n in enumerate(exams)]
    if found.kind == "pairs":
        drawn = [(rows[:n], exam) for (rows, exam), (n, _) in zip(drawn, counts)]
    else:
        drawn = [draw(part, *count, seed) for part, count in zip(parts, counts)]
    few = len(train) < SAMPLES and samples is None or len(held) < EVAL_SAMPLES and eval_samples is None
    if few:
        usual = f"the defaults are {SAMPLES:,} and {EVAL_SAMPLES:,}"
        note(f"note       few rows: {len(train):,} to train on and {len(held):,} held out ({usual})")
    for part, (to_train, to_score) in zip(parts, counts) if found.parts else ():
        note(f"note       {part.name}: {to_train:,} rows to train on, {to_score:,} held out")
    return _in_turn([rows for rows, _ in drawn], train), _in_turn([rows for _, rows in drawn], held)


def sizes(found, samples: int | None, eval_samples: int | None) -> tuple[list[int], list[int]]:
    """For each row to train on and for each to hold out the number of the part that it comes from."""
    parts = found.parts or (found,)
    weights = [part.weight for part in parts]
    there, own = [len(part.rows) for part in parts], [len(part.held_out) for part in parts]
    usual = EVAL_SAMPLES
    if not all(own):  # they are taken from the training rows: a fifth at most
        usual = min(usual, max(1, len(turns(SAMPLES + EVAL_SAMPLES, weights, there)) // 5))
    if samples is not None and eval_samples is None:  # what was asked for comes first
        train = turns(samples, weights, there)
        rest = [mine or has - train.count(i) for i, (mine, has) in enumerate(zip(own, there))]
        held = turns(usual, weights, rest)
        fit = "fewer fit with these weights" if found.parts else f"at most {sum(there) - 1} fit"
        require(bool(held), f"--samples {samples}: {fit}: one row at least is held out")
    else:
        most = [mine or has for mine, has in zip(own, there)]
        held = turns(usual if eval_samples is None else eval_samples, weights, most)
        rest = [has if mine else has - held.count(i) for i, (mine, has) in enumerate(zip(own, there))]
        train = turns(SAMPLES if samples is None else samples, weights, rest)
        all_of = f"the dataset has {sum(most)} different rows in all"
        all_of = f"with these weights {len(held)} rows can be held out" if found.parts else all_of
        if len(held) < (eval_samples or 0) or not any(rest):
            left = f"{all_of}; some have to be left to train on"
            raise UsageError(f"--eval-samples {eval_samples or usual}: {left}")
        there = rest
    without = f"{found.duplicates_removed} duplicates removed"
    left = f"{sum(there)} different rows are left for training ({without})"
    left = f"with these weights {len(train)} rows are there to train on" if found.parts else left
    wanted = 1 if samples is None else samples
    require(len(train) >= wanted, f"--samples {wanted}: {left}")
    return train, held


def turns(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Numbers of the parts that give one row after the other, by weight: 5, [3, 1] -> [0, 0, 1, 0, 0]

    Fewer than `total` where a part would have to give more than its `most`. Each beginning of the list keeps
    to the weights as well as its length allows (Webster's method), so fewer rows are a beginning of more.
    """
    if len(weights) == 1:
        return [0] * min(total, most[0])
    given, order = [0] * len(weights), []
    for _ in range(total):
        part = max(range(len(weights)), key=lambda i: weights[i] / (2 * given[i] + 1))
        if given[part] == most[part]:
            break
        given[part] += 1
        order.append(part)
    return order


def draw(part, train: int, held: int, seed: int) -> tuple[list, list]:
    """So many (training rows, held-out rows) of one dataset; only these are read where it is a large file."""
    pool, labels = _shuffled(part.rows, seed), labels_of(part.rows)
    scored = part.held_out if len(part.held_out) else part.rows
    exam = _shuffled(part.held_out, seed) if len(part.held_out) else pool
    exam = exam[_evenly(labels_of(scored)[exam], held)]
    if scored is part.rows:
        pool = pool[~np.isin(pool, exam)]
    chosen = pool[_evenly(labels[pool], train)]
    return [part.rows[i] for i in chosen.tolist()], [scored[i] for i in exam.tolist()]


def draw_pairs(parts: Sequence, held: Sequence[int], seed: int) -> tuple[list[tuple[list, list]], int]:
    """([(rows that may be trained on, held-out rows) of each part], how many were lost).

    Lost are those with the prompt of a pair that any part holds out. Pairs of one prompt are held out one
    after the other, so that few are lost. (All pairs are read into memory.)
    """
    drawn, found = [], 0
    for part, count in zip(parts, held):
        rows = [part.rows[i] for i in _shuffled(part.rows, seed).tolist()]
        own = [part.held_out[i] for i in _shuffled(part.held_out, seed).tolist()]
        place: dict[str, int] = {}
        for row in rows:
            place.setdefault(row.asked, len(place))
        exam = own[:count] if own else sorted(rows, key=lambda row: place[row.asked])[:count]
        chosen = set() if own else set(map(id, exam))
        rows = [row for row in rows if id(row) not in chosen]
        drawn.append((rows, exam))
        found += len(rows)
    seen = {row.asked for _, exam in drawn for row in exam}
    drawn = [([row for row in rows if row.asked not in seen], exam) for rows, exam in drawn]
    return drawn, found - sum(len(rows) for rows, _ in drawn)


def evenly(rows: list, count: int) -> list:
    """`count` rows, taking the labels in turn while they last; order kept."""
    return [rows[i] for i in _evenly(labels_of(rows), count).tolist()]


def _evenly(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` labels, each label in turn while it lasts: [1, 1, 0, 1], 3 -> [2, 0, 1]"""
    of_each = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    if not of_each:
        return np.zeros(0, dtype=np.int64)
    places = np.concatenate(of_each)
    turn = np.concatenate([np.arange(len(each)) for each in of_each])
    return places[np.lexsort((places, labels[places], turn))][:count]


def _shuffled(rows: Sequence, seed: int) -> np.ndarray:
    return torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).numpy()


def _in_turn(parts: list[list], order: list[int]) -> list:
    """[[a, b], [c]], [0, 1, 0] -> [a, c, b]"""
    left = [iter(rows) for rows in parts]
    return [next(left[part]) for part in order]
