"""The same held-out rows before and after training: base zero-shot, base few-shot, a bag of words, the tuned model."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Iterator

import numpy as np
from tqdm import tqdm

from config import FEW_SHOT, SENTIMENT_ANSWERS
from qlora import evaluation as e
from qlora import prompts as p
from qlora.cli import UserError, note
from qlora.data import Row, evenly
from qlora.fetch import sha256_of
from qlora.hardware import Hardware
from qlora.loading import Base, context_length
from qlora.runs import BEFORE, before_scores, write_json


@contextlib.contextmanager
def progress(rows: int, title: str) -> Iterator:
    with tqdm(total=rows, desc=title, unit="row", mininterval=2) as bar:
        yield bar.update


def label_scores(hardware: Hardware, base: Base, model, prompt: p.PromptFormat, rows: list[Row], title: str, examples=()) -> np.ndarray:
    """log P(answer) of each row and answer, (rows, answers); `model` is the base or a PEFT model around it."""
    prompts = [p.sentiment_prompt(base.tokenizer, prompt, row.text, examples) for row in rows]
    answers = [p.answer_ids(base.tokenizer, prompt, label) for label in range(len(prompt.answers))]
    with progress(len(rows), title) as step:
        return e.score_labels(model, prompts, answers, hardware.autocast, step)


def score_before(out: Path, hardware: Hardware, base: Base, prompt: p.PromptFormat, train_rows: list[Row], held_out: list[Row], examples: list[dict]) -> dict:
    """What is possible without training; kept in before.json part by part, so that --resume need not measure it again.

    `examples` are the encoded held-out rows (for perplexity, where there are no labels).
    """
    asked, before = fingerprint(prompt, base, train_rows, held_out), before_scores(out)
    if "asked" not in before:  # none, or of an older version
        before = {}
    elif before["asked"] != asked:
        raise UserError(f"{out}: dataset, prompt or base model have changed since this run began; start again with --overwrite")
    before |= {"asked": asked, "revision": base.info.revision}

    def keep(**part):
        before.update(part)
        write_json(out / BEFORE, before)

    if prompt.objective != "sentiment":
        if "perplexity" not in before:
            with progress(len(examples), "base, perplexity") as step:
                keep(perplexity=e.perplexity(base.model, examples, hardware.autocast, step))
        return before
    truth = [row.label for row in held_out]

    def scored(scores):
        return e.accuracy_report(scores.argmax(1).tolist(), truth, prompt.answers)

    if "scores" not in before:
        zero = label_scores(hardware, base, base.model, prompt, held_out, "base, zero-shot")
        keep(scores=zero.tolist(), base_zero_shot=scored(zero))
    if "base_few_shot" not in before:
        shots = FEW_SHOT if prompt.answers == SENTIMENT_ANSWERS else shortest(base.tokenizer, train_rows, len(FEW_SHOT))
        longest = prompt.max_length + len(p.sentiment_prompt(base.tokenizer, prompt, "", shots))
        if longest > context_length(base.model):
            note(f"note       no score with {len(shots)} examples: {longest} tokens are more than the {context_length(base.model)} that the model reads")
        else:
            scores = label_scores(hardware, base, base.model, prompt, held_out, f"base, {len(shots)} examples", shots)
            keep(base_few_shot={**scored(scores), "examples": len(shots)})
    if "bag_of_words" not in before:
        keep(bag_of_words=e.accuracy_report(e.bag_of_words(train_rows, held_out), truth, prompt.answers))
    return before


def fingerprint(prompt: p.PromptFormat, base: Base, *rows: list[Row]) -> str:
    """sha256 of what a run asks and of whom: scores of one run say nothing about another."""
    # A plain folder has no revision.
    weights = base.info.revision or [sha256_of(file) for file in sorted(Path(base.info.public_name).glob("*.safetensors"))]
    asked = [prompt.to_json(), weights, [[(row.text, row.label) for row in part] for part in rows]]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def shortest(tokenizer, rows: list[Row], count: int) -> list[tuple[str, int]]:
    """(text, label) of the shortest rows, the labels in turn: examples for labels of which config.FEW_SHOT knows nothing."""
    rows = evenly(sorted(rows, key=lambda row: len(row.text)), count)
    return [(p.shorten(tokenizer, p.clean(row.text), 64), row.label) for row in rows]


def score_after(hardware: Hardware, base: Base, model, prompt: p.PromptFormat, held_out: list[Row], examples: list[dict], before: dict) -> dict:
    """The report's `evaluation`: everything of `before`, the tuned model on the same rows, and what changed."""
    if prompt.objective != "sentiment":
        with progress(len(examples), "tuned, perplexity") as step:
            after = e.perplexity(model, examples, hardware.autocast, step)
        return {"rows": len(examples), "perplexity": {"before": before["perplexity"], "after": after}}
    truth = [row.label for row in held_out]
    tuned = label_scores(hardware, base, model, prompt, held_out, "tuned")
    changed = e.flips(np.array(before["scores"]), tuned, truth)
    # The most telling three: the two largest changes of mind for the better, the largest for the worse.
    telling = [("fixed", i) for i in changed["fixed"][:2]] + [("broken", i) for i in changed["broken"][:1]]
    examples_shown = [
        {"kind": kind, "truth": prompt.answers[truth[i]], "before": prompt.answers[int(np.argmax(before["scores"][i]))],
         "after": prompt.answers[int(tuned[i].argmax())], "text": shown(held_out[i].text)}
        for kind, i in telling
    ]
    return {
        "rows": len(held_out),
        **{k: before[k] for k in ("base_zero_shot", "base_few_shot", "bag_of_words") if k in before},
        "tuned": e.accuracy_report(tuned.argmax(1).tolist(), truth, prompt.answers),
        "flips": {"fixed": len(changed["fixed"]), "broken": len(changed["broken"]), "examples": examples_shown},
    }


def shown(text: str, characters: int = 300) -> str:
    """The end of a review, where the model looks, on one line."""
    text = " ".join(p.clean(text).split())
    return text if len(text) <= characters else "… " + text[-characters:]
