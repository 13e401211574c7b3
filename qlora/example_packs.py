"""Several examples in one row (--packing): which go together, and whether the model keeps them apart.

Position ids begin at 0 with each example. transformers makes a block-diagonal mask of that, and the CPU's
decoder (qlora/cpu) gives each example a row of its own.
"""

import bisect

import torch

from qlora.batches import collate
from qlora.cli import UsageError, note
from qlora.logits import IGNORE, causal_lm, logits_from, states_at

PROBE_TOKENS = 16  # of each of two examples, to see whether the second one notices the first


def pack(examples: list[dict], length: int, seed: int) -> list[dict]:
    """[{input_ids, labels, position_ids}] of at most `length` tokens; each example stands whole in one pack.

    The same packs whatever the epoch: their order is LengthBatches' matter.
    """
    packs = [
        joined([examples[i] for i in each])
        for each in fill([len(e["input_ids"]) for e in examples], length, seed)
    ]
    full = sum(len(p["input_ids"]) for p in packs) / (length * len(packs))
    what = f"{len(examples)} rows in {len(packs)} packs of at most {length} tokens, {full:.0%} full"
    note(
        f"packing    {what}; --batch-size counts packs, so a step sees {len(examples) / len(packs):.1f} times"
    )
    note("           as many rows, and an epoch has as many times fewer steps")
    return packs


def fill(lengths: list[int], most: int, seed: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each where it leaves least room; `seed` decides between equals.

    [5, 3, 4, 2], 8 -> [[0, 1], [2, 3]]
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that are free, pack), sorted
    for i in sorted(order, key=lambda i: -lengths[i]):
        found = bisect.bisect_left(room, (lengths[i], -1))
        free, number = room.pop(found) if found < len(room) else (most, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(i)
        if free > lengths[i]:
            bisect.insort(room, (free - lengths[i], number))
    return packs


def joined(examples: list[dict]) -> dict:
    """One row of several examples. What follows an example is the next one's first token: not its label."""
    return {
        "input_ids": [token for e in examples for token in e["input_ids"]],
        "labels": [label for e in examples for label in (IGNORE, *e["labels"][1:])],
        "position_ids": [position for e in examples for position in range(len(e["input_ids"]))],
    }


@torch.no_grad()
def refuse_leaks(model, examples: list[dict], autocast) -> None:
    """UsageError if an example has other logits behind a neighbour than alone, by more than rounding.

    Some attention (linear, convolutions, a state) goes on from one example to the next.
    """
    lm = causal_lm(model)
    first, second = (
        {name: e[name][:PROBE_TOKENS] for name in ("input_ids", "labels")}
        for e in (examples[0], examples[-1])
    )
    alone = logits_of_last(model, [second], autocast)
    try:
        behind = logits_of_last(model, [first, second], autocast)
    except TypeError:  # it takes no position_ids
        behind = torch.full_like(alone, torch.inf)
    gap = ((behind - alone).abs().max() / alone.abs().max()).item()
    if not gap <= max(1e-3, 8 * torch.finfo(lm.dtype).eps):
        sees = f"in {type(lm).__name__} an example sees its neighbour in the row"
        raise UsageError(f"--packing: {sees} (logits move by {gap:.1%}): leave --packing out")


def logits_of_last(model, examples: list[dict], autocast) -> torch.Tensor:
    """Logits (tokens, vocabulary) at all positions of the last of these examples, packed into one row."""
    model.eval()
    batch = collate([joined(examples)], 0)
    device = next(model.parameters()).device
    ids, positions = (batch[name].to(device) for name in ("input_ids", "position_ids"))
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[:, -len(examples[-1]["input_ids"]) :] = True
    with autocast():
        return logits_from(causal_lm(model), states_at(model, ids, wanted, position_ids=positions))
