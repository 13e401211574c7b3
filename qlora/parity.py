"""Is what was deployed still what was trained? Two next-token distributions a row, and what their difference means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence

import numpy as np

from config import ACCURACY_WITHIN, AGREEMENT, LOWEST_AGREEMENT

TINY = 1e-7  # probabilities below this are rounding of float32 sums
NOISE = 1e-5  # nats; nearer than this, another strength explains nothing: an adapter of one step moves no more


@dataclass
class Exam:
    """What every rung is asked."""

    tokenizer: object
    messages: list[list[dict]]  # of each review
    free: list[list[dict]]
    truth: list[int]
    answers: tuple[str, ...]
    answer_ids: tuple[int, int]  # first token of each answer
    free_tokens: int  # how far the free prompts are continued
    context: int  # tokens that hold the longest prompt and its continuation


@dataclass
class Replies:
    """What one rung of the ladder said."""

    prompts: list[list[int]]  # token ids of the reviews' prompts, then of the free ones
    odds: np.ndarray  # (rows,) log P(second answer) - log P(first answer) of the next token
    next: list  # of each row: (ids, logprobs) of the likeliest next tokens, or all logprobs (vocabulary,)
    free_next: list  # the same, of the free prompts
    free_text: list[str]  # greedy continuations of the free prompts
    load_seconds: float | None
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass
class Reference(Replies):
    """The model that was trained; `scaled` holds the first rows' logprobs with the adapter at other strengths: {0: (rows, vocabulary), …}."""

    scaled: dict[float, np.ndarray] = field(default_factory=dict)


def kl(reference: np.ndarray, ids: Sequence[int], logprobs: Sequence[float]) -> float:
    """KL(reference || other) in nats from the reference's logprobs (vocabulary,) and the other's likeliest tokens.

    All tokens that the other did not list count as one, so this is a lower bound; it is tight when the list holds nearly all
    the mass: kl(log [.5, .25, .25], [0], [log .5]) -> 0.0
    """
    p, q = np.exp(reference[list(ids)].astype(np.float64)), np.exp(np.asarray(logprobs, np.float64))
    p_rest, q_rest = max(1 - p.sum(), TINY), max(1 - q.sum(), TINY)
    return float((p * np.log(np.maximum(p, 1e-30) / np.maximum(q, 1e-30))).sum() + p_rest * np.log(p_rest / q_rest))


def divergence(reference: np.ndarray, other) -> float:
    """kl() against a list of likeliest tokens, or against all logprobs."""
    return kl(reference, *other) if isinstance(other, tuple) else kl(reference, range(len(other)), other)


def same_text(reference: str, other: str) -> float:
    """Share of the reference's characters before the first difference: same_text('one two', 'one 2') -> 0.571"""
    same = next((i for i, (a, b) in enumerate(zip(reference, other)) if a != b), min(len(reference), len(other)))
    return same / len(reference) if reference else float(other == reference)


def compare(reference: Reference, rung: Replies, truth: Sequence[int], answers: Sequence[str]) -> dict:
    """The figures of one rung, as parity.json holds them."""
    from qlora.evaluation import accuracy_report

    labels, wanted = (rung.odds > 0).astype(int), (reference.odds > 0).astype(int)
    shift = np.abs(rung.odds - reference.odds)
    divergences = [divergence(r, o) for r, o in zip(reference.next, rung.next)]
    free = [divergence(r, o) for r, o in zip(reference.free_next, rung.free_next)]
    return {
        "acts_like": acts_like(reference, rung),
        "prompt_ids_equal": rung.prompts == reference.prompts,
        "prompts_that_differ": sum(theirs != ours for theirs, ours in zip(rung.prompts, reference.prompts)),
        "agreement": float((labels == wanted).mean()),
        "disagreements": int((labels != wanted).sum()),
        "accuracy": accuracy_report(labels.tolist(), truth, answers),
        "log_odds_shift": {"mean": float(shift.mean()), "max": float(shift.max())},
        "kl": {"mean": float(np.mean(divergences)), "max": float(np.max(divergences))},
        "free": {"kl_mean": float(np.mean(free)), "same_text": float(np.mean([same_text(r, o) for r, o in zip(reference.free_text, rung.free_text)]))},
        "load_seconds": rung.load_seconds,
        "prefill_tokens_per_second": rung.prefill_tokens_per_second,
        "decode_tokens_per_second": rung.decode_tokens_per_second,
    }


def bounds(kind: str, quantization: str, trained_on_base: bool) -> tuple[float, float | None]:
    """(least label agreement, largest change of accuracy or None) for a rung.

    A base + LoRA pair is held to the strict bound where the adapter was trained on that very base; over another base it is not the
    model that was trained, and is only kept from being broken.
    """
    if kind == "lora":
        return (AGREEMENT["f16"], ACCURACY_WITHIN) if trained_on_base else (LOWEST_AGREEMENT, None)
    least = AGREEMENT.get(quantization, LOWEST_AGREEMENT)
    return least, ACCURACY_WITHIN if least == AGREEMENT["f16"] else None


def verdict(figures: dict, reference_accuracy: float, least: float, within: float | None) -> list[str]:
    """What a rung breaks, in words; empty if nothing. Fewer than 100 rows tell little: two more of them may differ."""
    rows = figures["accuracy"]["rows"]
    spare = 2 if rows < 100 else 0
    broken = []
    if not figures["prompt_ids_equal"]:
        broken.append(f"token ids of {figures['prompts_that_differ']} prompts differ")
    if figures["disagreements"] > int((1 - least) * rows + 1e-9) + spare:
        broken.append(f"labels agree on {100 * figures['agreement']:.1f}% of rows, bound {100 * least:g}%")
    if figures["acts_like"] != 1:
        broken.append(f"it answers as with the adapter at {figures['acts_like']:.3g} of its strength")
    change = abs(figures["accuracy"]["accuracy"] - reference_accuracy)
    if within is not None and change * rows > within * rows + spare + 1e-9:
        broken.append(f"accuracy changed by {100 * change:.1f} points, bound {100 * within:g}")
    return broken


def cause(reference: Reference, rung: Replies, decode) -> str:
    """The likely cause of a broken bound; `decode` turns token ids into text."""
    for theirs, ours in zip(rung.prompts, reference.prompts):
        if theirs != ours:
            return prompt_cause(theirs, ours, decode)
    strength = acts_like(reference, rung)
    if strength == 0:
        return "the adapter is not applied: the answers are those of the base alone"
    if strength != 1:
        return f"the adapter is scaled wrong: it acts like {strength:.3g} times what was trained, of the strengths tried (alpha/r where rsLoRA means alpha/sqrt(r)?)"
    return "the weights differ: too few bits, another base under the adapter, or another adapter"


def acts_like(reference: Reference, rung: Replies) -> float:
    """The adapter's strength that explains the answers best, of those that were tried: 1, unless another one's are clearly nearer."""
    if not reference.scaled:
        return 1
    distance = {strength: np.mean([divergence(r, o) for r, o in zip(logprobs, rung.next)]) for strength, logprobs in reference.scaled.items()}
    nearest = min(distance, key=distance.get)
    return nearest if distance[1] > NOISE and distance[nearest] < distance[1] / 2 else 1


def prompt_cause(theirs: list[int], ours: list[int], decode) -> str:
    """Where two prompts part, and what that means."""
    at = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours)))
    if theirs[1:] == ours and theirs[0] == ours[0]:
        return f"BOS is doubled: the file puts {decode(theirs[:1])!r} before a prompt that begins with it"
    if theirs[1:] == ours:
        return f"BOS is added: the file puts {decode(theirs[:1])!r} before the prompt, training did not"
    if theirs == ours[1:]:
        return f"BOS is missing: the prompt should begin with {decode(ours[:1])!r}"
    if decode(theirs) == decode(ours):
        return f"the tokenizer splits the same text otherwise: from token {at} on the file has {[decode([i]) for i in theirs[at : at + 4]]}, training had {[decode([i]) for i in ours[at : at + 4]]}"
    return f"the chat template is another one: at token {at} the file has {decode(theirs[at : at + 8])!r}, training had {decode(ours[at : at + 8])!r}"
