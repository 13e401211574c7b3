"""Is what was deployed still what was trained? Next-token distributions compared, differences explained."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from qlora.cli import note
from qlora.evaluation import accuracy_report
from qlora.measures import kl_nats, percent
from settings import AGREEMENT, DRIFT_TIMES, LOWEST_AGREEMENT, SURE_TIMES, SURVIVAL, SURVIVAL_STRICT
from survival import rms, rounding, survival

TINY = 1e-7  # probabilities below this are rounding of float32 sums

OTHER_WEIGHTS = "the weights differ: rounded before, another base under the adapter, or another adapter"

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
    # `odds` of its first rows by the base alone in the same form; None if that was not asked
    base: np.ndarray | None = None
    merge_drift: float = 0.0  # of the trained model: rms of what its 16-bit merge changes in `odds`
    # Of the trained model: `odds` of its first rows with the adapter at other strengths, {0.5: (rows,)}
    scaled: dict[float, np.ndarray] = field(default_factory=dict)


@dataclass
class Bound:
    """What a file must keep: shares of surely labelled rows and of the adapter's effect."""

    agreement: float
    survival: float
    strict: bool  # a file that holds what was trained in 8 bits or more may drift only as rounding explains


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
    labels, differ = (replies.odds > 0).astype(int), (replies.odds > 0) != (trained.odds > 0)
    shift = np.abs(replies.odds - trained.odds)
    distances = [kl(r, o) for r, o in zip(trained.next, replies.next)]
    same = [same_text(r, o) for r, o in zip(trained.free_text, replies.free_text)]
    figures = {"rounding": None, "survival": None}
    if replies.base is not None:
        first = len(replies.base)
        of_both = trained.odds[:first], trained.base[:first]
        noise = rounding(replies.base, *of_both, trained.merge_drift)
        left = survival(replies.odds[:first], replies.base, *of_both, noise["noise"])
        figures = {"rounding": noise, "survival": left | {"rows": first}}
    # A label is sure if its log-odds are further from zero than rounding gets.
    sure = np.abs(trained.odds) > SURE_TIMES * (figures["rounding"] or {"noise": 0})["noise"]
    return figures | {
        "prompt_ids_equal": replies.prompts == trained.prompts,
        "prompts_that_differ": sum(a != b for a, b in zip(replies.prompts, trained.prompts)),
        "agreement": float(1 - differ.mean()),
        "disagreements": int(differ.sum()),
        "sure": {"rows": int(sure.sum()), "disagreements": int((differ & sure).sum())},
        "accuracy": accuracy_report(labels.tolist(), truth, answers),
        "log_odds_shift": {"mean": float(shift.mean()), "rms": rms(shift), "max": float(shift.max())},
        "kl": {"mean": float(np.mean(distances)), "max": float(np.max(distances))},
        "free": {"kl_mean": mean_kl(trained.free_next, replies.free_next), "same_text": float(np.mean(same))},
        **replies.speed,
    }


def bound(kind: str, quantization: str, trained_on_base: bool, grid: str | None = None) -> Bound:
    """What is asked of a file.

    A base + LoRA pair is held to the strict bound if the adapter was trained on that very base. Over another
    base it is not the model that was trained, and only has to work. So it is with --qat (`grid`): the file of
    that type is the model that was trained, all others are not.
    """
    if grid is not None:
        quantization = "f16" if (kind, quantization) == ("merged", grid) else ""
    elif kind == "lora":
        quantization = "f16" if trained_on_base else ""
    agreement = AGREEMENT.get(quantization, LOWEST_AGREEMENT)
    strict = agreement == AGREEMENT["f16"]
    return Bound(agreement, SURVIVAL_STRICT if strict else SURVIVAL, strict and kind != "transformers")


def broken_bounds(figures: dict, bound: Bound) -> list[str]:
    """Which bounds are broken, in words. Fewer than 100 rows tell little: two more of them may differ."""
    rows, sure = figures["accuracy"]["rows"], figures["sure"]
    left, noise = figures["survival"], figures["rounding"]
    broken = []
    if not figures["prompt_ids_equal"]:
        broken.append(f"token ids of {figures['prompts_that_differ']} prompts differ")
    if sure["disagreements"] > int((1 - bound.agreement) * rows + 1e-9) + (2 if rows < 100 else 0):
        allowed = f"bound {100 * (1 - bound.agreement):.3g}% of {rows}"
        broken.append(f"{sure['disagreements']} labels differ that rounding can't explain, {allowed}")
    if noise is None:
        return broken
    if left["high"] < bound.survival:
        share = f"only {percent(left['share'])} of what training changed is left"
        broken.append(f"{share}, bound {100 * bound.survival:g}%")
    if left["low"] > 1 / bound.survival:
        broken.append(f"what training changed is there {left['share']:.2g} times")
    drift = figures["log_odds_shift"]["rms"]
    if bound.strict and drift > DRIFT_TIMES * noise["noise"]:  # with fewer bits, drift is a result
        broken.append(f"its answers drift by {drift:.2g}, rounding explains {noise['noise']:.2g}")
    return broken


def can_judge(figures: dict) -> bool:
    """Whether what the adapter changes stands out from this form's rounding."""
    found = figures["rounding"]
    return bool(found) and found["effect"] > 2 * found["noise"]


def strength(trained: Replies, replies: Replies, noise: float) -> float | None:
    """The adapter's strength that explains the answers, up to what rounding may add; None if none does.

    What the form changes in the base is subtracted, where it is known: rounding moves all strengths alike.
    """
    rows = len(trained.scaled[1])
    form = trained.base if replies.base is None else replies.base
    changed = replies.odds[:rows] - form[:rows]
    distance = {s: rms(changed - (odds - trained.base[:rows])) for s, odds in trained.scaled.items()}
    nearest = min(distance, key=distance.get)
    may_add = distance[1] / 2 if replies.base is None else DRIFT_TIMES * noise
    return nearest if distance[nearest] < may_add else None


def cause(trained: Replies, replies: Replies, figures: dict, decode: Callable) -> str:
    """The likely cause of a broken bound; `figures` as compare() has them, `decode` turns ids into text."""
    for theirs, ours in zip(replies.prompts, trained.prompts):
        if theirs != ours:
            return prompt_cause(theirs, ours, decode)
    noise = figures["rounding"]["noise"] if figures["rounding"] else 0.0
    acts_like = strength(trained, replies, noise) if trained.scaled else None
    if acts_like == 0:
        return "the adapter is not applied: the answers are those of the base alone"
    if acts_like not in (1, None):
        tried = f"of the strengths tried, it acts like {acts_like:.3g} times what was trained"
        return f"the adapter is scaled wrong: {tried} (lora_alpha; rsLoRA's alpha/sqrt(r))"
    return OTHER_WEIGHTS


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


def result(name: str, replies: Replies, trained: Replies, questions, bound: Bound | None, **facts) -> dict:
    """One row of the ladder: `facts`, figures and what is broken; also shown in one line."""
    figures = compare(trained, replies, questions.truth, questions.answers)
    broken = broken_bounds(figures, bound) if bound else []
    why = cause(trained, replies, figures, questions.tokenizer.decode) if broken else None
    agrees = f"agrees on {percent(figures['agreement'])}" if bound else "reference"
    speed = f"{figures['decode_tokens_per_second']:.1f} tokens/s"
    failed = f"; broken: {'; '.join(broken)}: {why}" if broken else ""
    note(f"{name:14} {agrees}, accuracy {percent(figures['accuracy']['accuracy'])}, {speed}{failed}")
    limits = asdict(bound) if bound else None
    return {"name": name, **facts, **figures, "bound": limits, "broken": broken, "cause": why}


def hold_lora_to_q8(results: list[dict]) -> None:
    """A pair that is exactly what was trained must be nearer to it than the merged Q8_0."""
    q8 = next((r for r in results if r["name"] == "Q8_0" and "kl" in r), None)
    for r in results:
        strict = r.get("kind") == "lora" and "kl" in r and r["bound"]["strict"]
        if q8 and strict and r["kl"]["mean"] >= q8["kl"]["mean"]:
            r["broken"].append(f"mean KL {r['kl']['mean']:.2g} is not below Q8_0's {q8['kl']['mean']:.2g}")
            r["cause"] = r["cause"] or "the pair is not what was trained"
