"""Does a server answer as the adapter that was trained? Asked over HTTP, as a client would ask it.

The trained model answers the same questions in transformers, its adapter at several strengths, over the
base as it was held in training and over the original 16-bit base. What the server says lies near one of them,
or near none of them, and that tells what is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from doctor_questions import Asked, Reference, Served, ask_endpoint, ask_transformers, read_asked
from ladder import mean_kl, prompt_cause, same_text
from openai_api import Endpoint
from qlora.adapters import Adapter
from qlora.cli import UserError, note
from qlora.files import write_json, write_text
from qlora.measures import percent
from qlora.tables import markdown_table, table
from settings import ParitySettings
from survival import rms

WATCHED = 8  # likeliest tokens that are compared where there are no labels
# How far answers may be from what explains them, as a share of the adapter's effect and at least: rounding to
# 8 bits and more moves them by 0.05; what 4 bits do to a base is known only when it is measured.
EXPLAINED, EXPLAINED_IN_FEW_BITS, ROUNDING = 0.04, 0.25, 0.12
LEAST = 1e-3  # probability of all other tokens below which it is rounding
SAME_MODEL = 0.1  # nearer than this, two answers of one server are one model's
BASE_KL = 0.05  # nats: how far the server's base may be from ours; in few bits, what 4 bits changed here


@dataclass
class Verdict:
    fault: str | None  # in words; None: healthy
    figures: dict


def seen(logprobs: np.ndarray, ids: Sequence[int], length: int) -> np.ndarray:
    """Of `ids` and of all other tokens together, as a list of the `length` likeliest tokens shows them.

    What is not listed counts as the least that is. log [.6, .3, .1] of ids 0 and 2 in a list of two tokens:
    log .6, log .3, and log .1 for the rest, less their mean, since a softmax takes no heed of it.
    """
    least = np.partition(logprobs, -length)[-length]
    return with_others(np.maximum(logprobs[list(ids)], least))


def listed(top: tuple, ids: Sequence[int]) -> np.ndarray:
    """The same of a server's list."""
    found, least = dict(zip(*top)), top[1].min()
    return with_others(np.array([max(found.get(i, least), least) for i in ids]))


def with_others(values: np.ndarray) -> np.ndarray:
    others = np.log(max(1 - np.exp(values.astype(np.float64)).sum(), LEAST))
    values = np.append(values, others)
    return values - values.mean()


def judge(asked: Asked, reference: Reference, served: Served) -> Verdict:
    """What the server's answers say, the surest signs first."""
    figures: dict = {"questions": asked.scored}
    if fault := judge_prompts(asked, served, figures):
        return Verdict(fault, figures)
    compare_texts(asked, reference, served, figures)
    rows = [i for i, reply in enumerate(served.replies) if reply.top]
    if len(rows) < asked.scored / 2:
        figures["listed"] = len(rows)
        return Verdict(judge_texts(asked, figures), figures)
    return Verdict(judge_weights(asked, reference, served, rows, figures), figures)


def judge_prompts(asked: Asked, served: Served, figures: dict) -> str | None:
    told = [(theirs, ours) for theirs, ours in zip(served.prompts, asked.ids) if theirs is not None]
    counted = [(r.prompt_tokens, len(ids)) for r, ids in zip(served.replies, asked.ids) if r.prompt_tokens]
    differ = sum(theirs != ours for theirs, ours in told or counted)
    figures["prompts"] = {"told": len(told), "counted": len(counted), "differ": differ}
    for theirs, ours in told:
        if theirs != ours:
            return prompt_cause(theirs, ours, asked.tokenizer.decode)
    more = [theirs - ours for theirs, ours in counted]
    if not any(more):
        return None
    if all(n == 1 for n in more):
        return "BOS is doubled or added: the server reads one token more of every prompt than training did"
    cut = max(theirs for theirs, _ in counted)
    if all(theirs == min(ours, cut) for theirs, ours in counted):
        return f"the server cuts prompts at {cut} tokens (its context is too short)"
    several = sorted(set(more))
    words = ", ".join(f"{n:+d}" for n in several[:5])
    return f"another chat template: the server's prompts have other lengths than in training ({words} tokens)"


def label_of(asked: Asked, text: str) -> int:
    """The answer that a text begins with; -1: none."""
    begins = [text.strip().lower().startswith(answer.lower()) for answer in asked.answers]
    return begins.index(True) if True in begins else -1


def compare_texts(asked: Asked, reference: Reference, served: Served, figures: dict) -> None:
    """Labels by what was written, and free answers beside each form's."""
    if asked.answer_ids:
        said = np.array([label_of(asked, reply.text) for reply in served.replies])
        ids = list(asked.answer_ids)
        for name, strength in (("trained", 1.0), ("base", 0.0)):
            best = [
                logprobs[:, ids].argmax(1) for (_, s), logprobs in reference.said.items() if s == strength
            ]
            figures[f"labels_as_{name}"] = max(float((said == labels).mean()) for labels in best)
        figures["no_label"] = int((said < 0).sum())
    same = {
        form: float(np.mean([same_text(ours, theirs) for ours, theirs in zip(texts, served.texts)]))
        for form, texts in reference.texts.items()
    }
    figures["free_text"] = same


def judge_texts(asked: Asked, figures: dict) -> str | None:
    """Without log-probabilities only what was written can be judged."""
    if not asked.answer_ids:
        near = max(figures["free_text"].values())
        return (
            None if near > 0.5 else "its free answers are others; without log-probabilities no more is seen"
        )
    trained, base = figures["labels_as_trained"], figures["labels_as_base"]
    if trained >= 0.9:
        return None
    if figures["no_label"] > asked.scored / 2 or base > trained:
        return "the adapter is not applied, by the labels alone: the server lists no log-probabilities"
    return f"{percent(1 - trained)} of its labels are others; without log-probabilities no more is seen"


def judge_weights(
    asked: Asked, reference: Reference, served: Served, rows: list, figures: dict
) -> str | None:
    """Nearest of the forms and strengths that were tried, if near enough to explain the answers."""
    ids = watched(asked, reference)
    lists = [served.replies[i].top for i in rows]
    theirs = np.concatenate([listed(top, ids[i]) for i, top in zip(rows, lists)])
    ours = {
        key: np.concatenate([seen(said[i], ids[i], len(top[0])) for i, top in zip(rows, lists)])
        for key, said in reference.said.items()
    }
    distance = {key: rms(theirs - values) for key, values in ours.items()}
    effect = rms(ours[reference.first, 1.0] - ours[reference.first, 0.0])
    nearest = min(distance, key=distance.get)
    healthy = min((key for key in distance if key[1] == 1), key=distance.get)
    share = EXPLAINED_IN_FEW_BITS if served.few_bits else EXPLAINED
    explained = max(share * effect, ROUNDING)
    figures |= {"listed": len(rows), "effect": effect, "explained": explained, "few_bits": served.few_bits}
    figures |= {"nearest": {"form": nearest[0], "strength": nearest[1], "distance": distance[nearest]}}
    figures |= {"drift": distance[healthy], "form": healthy[0]}
    figures["kl"] = mean_kl([reference.said[healthy][i] for i in rows], [kl_list(top) for top in lists])
    base_alone = compare_base(reference, served, ids, figures)
    if effect < 2 * ROUNDING:
        return f"can't be judged: the adapter changes log-probabilities by {effect:.2g} only"
    if base_alone is not None and figures["base"]["kl"] > figures["base"]["kl_bound"]:
        return (
            "another base, or the same in fewer bits: without the adapter, too, the server answers otherwise"
        )
    if base_alone is not None and rms(theirs - base_alone[rows].ravel()) < SAME_MODEL * effect:
        return "the adapter is not applied: the server answers as its base alone does"
    if distance[healthy] <= explained and distance[healthy] <= 1.5 * distance[nearest]:
        return None
    if distance[nearest] > explained or nearest[1] == 0 and base_alone is not None:
        return unexplained(served, base_alone is not None)
    if nearest[1] == 0:
        return "the adapter is not applied: the answers are those of the base alone"
    tried = f"of the strengths tried, it acts like {nearest[1]:.3g} times what was trained"
    return f"the adapter is scaled wrong: {tried} (lora_alpha; rsLoRA's alpha/sqrt(r))"


def unexplained(served: Served, base_is_ours: bool) -> str:
    """What answers can be that are near none of those tried."""
    causes = ["another adapter"] if base_is_ours else ["another adapter", "another base under it"]
    causes += ["weights in few bits (the server does not say)"] if served.few_bits is None else []
    return ", or ".join([", ".join(causes[:-1]), causes[-1]] if len(causes) > 1 else causes)


def kl_list(top: tuple) -> tuple:
    """A list without tokens that are none of ours."""
    known = [k for k, i in enumerate(top[0]) if i >= 0]
    return [top[0][k] for k in known], top[1][known]


def watched(asked: Asked, reference: Reference) -> list[list[int]]:
    """Ids whose log-probabilities are compared, of each question."""
    if asked.answer_ids:
        return [list(asked.answer_ids)] * asked.scored
    return [np.argsort(-row)[:WATCHED].tolist() for row in reference.said[reference.first, 1.0]]


def compare_base(reference: Reference, served: Served, ids: list, figures: dict) -> np.ndarray | None:
    """The server's base beside ours: (questions, watched) of the server's; None if it can't be asked."""
    if served.base is None or not all(reply.top for reply in served.base):
        return None
    lists = [kl_list(reply.top) for reply in served.base]
    bases = [list(said) for (_, strength), said in reference.said.items() if strength == 0]
    bound = BASE_KL
    if served.few_bits:
        every = np.arange(len(bases[0][0]))
        bound = max(bound, 1.5 * mean_kl(bases[0], [(every, row) for row in bases[-1]]))
    figures["base"] = {"kl": min(mean_kl(said, lists) for said in bases), "kl_bound": bound}
    return np.array([listed(reply.top, ids[i]) for i, reply in enumerate(served.base)])


# --- the record ---


def examine(s: ParitySettings) -> None:
    """Compare, show, write doctor.json and doctor.md; raises UserError with the likely fault."""
    adapter, asked = read_asked(s)
    there = Endpoint.connect(s.endpoint, asked.tokenizer, adapter.name, s.served_model)
    base = "its base can be asked, too" if there.base_fields else "its base alone can't be asked"
    note(f"server     {there.kind}, model {there.model}; {base}")
    served = ask_endpoint(there, asked)  # first: it can fail, and quickly
    verdict = judge(asked, ask_transformers(adapter, asked), served)
    show(s, adapter, there, verdict)


def show(s: ParitySettings, adapter: Adapter, there: Endpoint, verdict: Verdict) -> None:
    rows = lines(verdict)
    print(table(["what", "found"], rows, indent=0))
    record = {"adapter": adapter.name, "server": there.kind, "model": there.model}
    record |= {"fault": verdict.fault, **verdict.figures}
    s.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(s.output_dir / "doctor.json", record)
    text = markdown_table(["what", "found"], rows)
    write_text(s.output_dir / "doctor.md", f"# {there.model} at {there.kind}\n\n{text}\n")
    note(f"written    {s.output_dir}/: doctor.json, doctor.md")
    if verdict.fault:
        raise UserError(f"{there.shown}: {verdict.fault}")


def lines(verdict: Verdict) -> list[list[str]]:
    """The figures in words, those that there are."""
    f = verdict.figures
    prompts, rows = f["prompts"], [["questions", str(f["questions"])]]
    how = "their tokens" if prompts["told"] else "their lengths" if prompts["counted"] else "not told"
    rows.append(["prompts that differ", f"{prompts['differ']} (by {how})"])
    if "labels_as_trained" in f:
        rows.append(
            ["labels as trained", f"{percent(f['labels_as_trained'])} (base: {percent(f['labels_as_base'])})"]
        )
    for form, share in f.get("free_text", {}).items():
        rows.append([f"free answers, {form}", f"{percent(share)} of the text before a difference"])
    if "drift" in f:
        near = f["nearest"]
        rows.append(
            ["log-odds", f"off by {f['drift']:.2g} ({f['form']}) of {f['effect']:.2g} that training changed"]
        )
        rows.append(
            ["nearest", f"{near['form']}, adapter x {near['strength']:.3g}: off by {near['distance']:.2g}"]
        )
        rows.append(["KL", f"{f['kl']:.2g} nats from the trained model"])
    if "base" in f:
        rows.append(["KL of the bases", "{kl:.2g} nats (bound {kl_bound:.2g})".format(**f["base"])])
    return [*rows, ["verdict", verdict.fault or "healthy"]]
