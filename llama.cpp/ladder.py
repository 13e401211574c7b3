"""Is what was deployed still what was trained? Next-token distributions compared, differences explained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from qlora.cli import note
from qlora.evaluation import accuracy_report
from qlora.measures import kl_nats, percent
from settings import ACCURACY_WITHIN, AGREEMENT, LOWEST_AGREEMENT

TINY = 1e-7  # probabilities below this are rounding of float32 sums
NOISE = 1e-5  # nats; nearer than this, another strength explains nothing: one training step moves no more

SPEED = ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")


@dataclass
class Replies:
    """What one model or file answered."""

    prompts: list[list[int]]  # token ids of the reviews' prompts, then of the free ones
    odds: np.ndarray  # (rows,) log P(second answer) - log P(first answer) of the next token
    next: list  # per row: logprobs of the next token (vocabulary,), or (ids, logprobs) of the likeliest ones
    free_next: list  # the same, of the free prompts
    free_text: list[str]  # greedy continuations of the free prompts
    speed: dict[str, float | None]  # by the names in SPEED
    # Of the trained model: logprobs of its first rows at other strengths, {0: (rows, vocabulary)}
    scaled: dict[float, np.ndarray] = field(default_factory=dict)


def kl(reference: np.ndarray, other) -> float:
    """KL(reference || other) in nats from logprobs (vocabulary,); `other` may be (ids, logprobs) of a list.

    All tokens outside the list count as one, so this is a lower bound. It is tight when the list holds nearly
    all of the probability: kl(log [.5, .25, .25], ([0], log [.5])) -> 0.0
    """
    p, q = reference, other
    if isinstance(other, tuple):
        p, q = with_rest(reference[list(other[0])]), with_rest(other[1])
    return kl_nats(torch.as_tensor(p, dtype=torch.float64), torch.as_tensor(q, dtype=torch.float64))


def with_rest(listed: Sequence[float]) -> np.ndarray:
    """Log-probabilities of some tokens and, at the end, of all others together."""
    return np.append(listed, np.log(max(1 - np.exp(np.asarray(listed, np.float64)).sum(), TINY)))


def mean_kl(references: Sequence[np.ndarray], others: Sequence) -> float:
    return float(np.mean([kl(r, o) for r, o in zip(references, others)]))


def same_text(reference: str, other: str) -> float:
    """Share of the reference's characters before the first difference: 'one two', 'one 2' -> 0.571"""
    return first_difference(reference, other) / len(reference) if reference else float(other == reference)


def first_difference(a: Sequence, b: Sequence) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def compare(trained: Replies, replies: Replies, truth: Sequence[int], answers: Sequence[str]) -> dict:
    """The figures of one row of the ladder, as parity.json holds them."""
    labels, wanted = (replies.odds > 0).astype(int), (trained.odds > 0).astype(int)
    shift = np.abs(replies.odds - trained.odds)
    distances = [kl(r, o) for r, o in zip(trained.next, replies.next)]
    same = [same_text(r, o) for r, o in zip(trained.free_text, replies.free_text)]
    return {
        "acts_like": strength(trained, replies),
        "prompt_ids_equal": replies.prompts == trained.prompts,
        "prompts_that_differ": sum(a != b for a, b in zip(replies.prompts, trained.prompts)),
        "agreement": float((labels == wanted).mean()),
        "disagreements": int((labels != wanted).sum()),
        "accuracy": accuracy_report(labels.tolist(), truth, answers),
        "log_odds_shift": {"mean": float(shift.mean()), "max": float(shift.max())},
        "kl": {"mean": float(np.mean(distances)), "max": float(np.max(distances))},
        "free": {"kl_mean": mean_kl(trained.free_next, replies.free_next), "same_text": float(np.mean(same))},
        **replies.speed,
    }


def bounds(kind: str, quantization: str, trained_on_base: bool) -> tuple[float, float | None]:
    """(least label agreement, largest change of accuracy or None) for a file.

    A base + LoRA pair is held to the strict bound if the adapter was trained on that very base. Over another
    base it is not the model that was trained, and only has to work.
    """
    if kind == "lora":
        return (AGREEMENT["f16"], ACCURACY_WITHIN) if trained_on_base else (LOWEST_AGREEMENT, None)
    least = AGREEMENT.get(quantization, LOWEST_AGREEMENT)
    return least, ACCURACY_WITHIN if least == AGREEMENT["f16"] else None


def broken_bounds(figures: dict, trained_accuracy: float, least: float, within: float | None) -> list[str]:
    """Which bounds are broken, in words. Fewer than 100 rows tell little: two more of them may differ."""
    rows = figures["accuracy"]["rows"]
    spare = 2 if rows < 100 else 0
    broken = []
    if not figures["prompt_ids_equal"]:
        broken.append(f"token ids of {figures['prompts_that_differ']} prompts differ")
    if figures["disagreements"] > int((1 - least) * rows + 1e-9) + spare:
        broken.append(f"labels agree on {percent(figures['agreement'])} of rows, bound {100 * least:g}%")
    if figures["acts_like"] != 1:
        broken.append(f"it answers as with the adapter at {figures['acts_like']:.3g} of its strength")
    change = abs(figures["accuracy"]["accuracy"] - trained_accuracy)
    if within is not None and change * rows > within * rows + spare + 1e-9:
        broken.append(f"accuracy changed by {100 * change:.1f} points, bound {100 * within:g}")
    return broken


def strength(trained: Replies, replies: Replies) -> float:
    """The adapter's strength that explains the answers best: 1 unless another one is clearly nearer."""
    if not trained.scaled:
        return 1
    distance = {s: mean_kl(logprobs, replies.next) for s, logprobs in trained.scaled.items()}
    nearest = min(distance, key=distance.get)
    return nearest if distance[1] > NOISE and distance[nearest] < distance[1] / 2 else 1


def cause(trained: Replies, replies: Replies, decode: Callable) -> str:
    """The likely cause of a broken bound; `decode` turns token ids into text."""
    for theirs, ours in zip(replies.prompts, trained.prompts):
        if theirs != ours:
            return prompt_cause(theirs, ours, decode)
    acts_like = strength(trained, replies)
    if acts_like == 0:
        return "the adapter is not applied: the answers are those of the base alone"
    if acts_like != 1:
        tried = f"of the strengths tried, it acts like {acts_like:.3g} times what was trained"
        return f"the adapter is scaled wrong: {tried} (alpha/r where rsLoRA means alpha/sqrt(r)?)"
    return "the weights differ: too few bits, another base under the adapter, or another adapter"


def prompt_cause(theirs: list[int], ours: list[int], decode: Callable) -> str:
    """Where two prompts part, and what that means."""
    at = first_difference(theirs, ours)
    if theirs[1:] == ours and theirs[0] == ours[0]:
        return f"BOS is doubled: the file puts {decode(theirs[:1])!r} before a prompt that begins with it"
    if theirs[1:] == ours:
        return f"BOS is added: the file puts {decode(theirs[:1])!r} before the prompt, training did not"
    if theirs == ours[1:]:
        return f"BOS is missing: the prompt should begin with {decode(ours[:1])!r}"
    if decode(theirs) == decode(ours):
        theirs, ours = ([decode([i]) for i in ids[at : at + 4]] for ids in (theirs, ours))
        return f"the tokenizer splits the same text differently: at token {at} {theirs}, in training {ours}"
    theirs, ours = (decode(ids[at : at + 8]) for ids in (theirs, ours))
    return f"another chat template: at token {at} the file has {theirs!r}, training had {ours!r}"


def result(name: str, replies: Replies, trained: Replies, questions, bound=(0.0, None), **facts) -> dict:
    """One row of the ladder: `facts`, figures and what is broken; also shown in one line."""
    figures = compare(trained, replies, questions.truth, questions.answers)
    trained_right = np.mean((trained.odds > 0) == np.array(questions.truth))
    broken = broken_bounds(figures, trained_right, *bound)
    why = cause(trained, replies, questions.tokenizer.decode) if broken else None
    agrees = "reference" if replies is trained else f"agrees on {percent(figures['agreement'])}"
    speed = f"{figures['decode_tokens_per_second']:.1f} tokens/s"
    failed = f"; broken: {'; '.join(broken)}: {why}" if broken else ""
    note(f"{name:14} {agrees}, accuracy {percent(figures['accuracy']['accuracy'])}, {speed}{failed}")
    limits = {"agreement": bound[0], "accuracy_within": bound[1]}
    return {"name": name, **facts, **figures, "bound": limits, "broken": broken, "cause": why}


def hold_lora_to_q8(results: list[dict]) -> None:
    """A pair that is exactly what was trained must be nearer to it than the merged Q8_0."""
    q8 = next((r for r in results if r["name"] == "Q8_0" and "kl" in r), None)
    for r in results:
        strict = r.get("kind") == "lora" and "kl" in r and r["bound"]["accuracy_within"] is not None
        if q8 and strict and r["kl"]["mean"] >= q8["kl"]["mean"]:
            r["broken"].append(f"mean KL {r['kl']['mean']:.2g} is not below Q8_0's {q8['kl']['mean']:.2g}")
            r["cause"] = r["cause"] or "the pair is not what was trained"
