"""Held-out rows before and after training: base zero-shot, base few-shot, a bag of words, the tuned model."""

import contextlib
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from config import FEW_SHOT, SENTIMENT_ANSWERS
from qlora import evaluation as e
from qlora import processes
from qlora import prompts as p
from qlora.batches import encode_rows
from qlora.cli import UserError, note, progress
from qlora.data import Row
from qlora.files import sha256_of, write_record
from qlora.loading import Base
from qlora.logits import IGNORE
from qlora.splitting import evenly
from qlora.training import forgetting
from qlora.training.run_folder import BEFORE, Run
from qlora.variants import WEIGHTS, Start

FROM_START = ("initial", "pairs", "reference")  # measured of the model as training begins, not of the base
UNTRAINED = ("base_zero_shot", "base_few_shot", "bag_of_words", "initial")


class BeforeAfter:
    """Scores of one run's held-out rows, each of them tokenized once for before and after."""

    def __init__(self, base: Base, prompt: p.PromptFormat, held_out: list[Row]):
        self.base, self.prompt, self.held_out = base, prompt, held_out
        self.truth = [row.label for row in held_out]
        if prompt.asks:
            self.prompts = [p.sentiment_prompt(base.tokenizer, prompt, row.text) for row in held_out]
        else:
            self.examples = encode_rows(base.tokenizer, prompt, held_out, "held-out")

    def score_before(self, run: Run, model, train_rows: list[Row], start: Start) -> dict:
        """What the base can do: `model` with its adapter off; part by part, so --resume need not repeat it.

        Where a part of the base was moved into the adapter the base is both together. What is scored of the
        model as training begins, see FROM_START, has its adapter on.
        """
        asked, before = self._fingerprint(train_rows, start.initial), processes.told_by_first(run.kept())
        if "fingerprint" not in before:  # nothing yet, or scores of an older version: measured again
            before = {"fingerprint": asked, "revision": self.base.info.revision}
        elif before["fingerprint"] != asked:
            what = "dataset, prompt or base model have changed since this run began"
            raise UserError(f"{run.out}: {what}; start again with --overwrite")
        parts = self.parts(model, train_rows)
        parts["forgetting"] = lambda: {"forgetting": forgetting.measure(self.base, model, "base")}
        for name, measure in parts.items():
            with_adapter = start.variant.start == "split" or name in FROM_START
            with_adapter |= start.initial is not None and name == "perplexity"
            if name in before or name == "initial" and not start.initial:
                continue
            with contextlib.nullcontext() if with_adapter else model.disable_adapter():
                before |= measure()
            if processes.is_first():
                write_record(run.out / BEFORE, before)
        return before

    def parts(self, model, train_rows: list[Row]) -> dict:
        """{name: what measures it before training, as a dict for before.json}"""
        if not self.prompt.asks:
            return {"perplexity": lambda: {"perplexity": self._perplexity(model, "before")}}
        return {
            "base_zero_shot": lambda: self._zero_shot(model),
            "base_few_shot": lambda: self._few_shot(model, train_rows),
            "bag_of_words": lambda: {"bag_of_words": self._report(bag_of_words(train_rows, self.held_out))},
            "initial": lambda: {"initial": self.score_now(model, "initial adapter")},
        }

    def score_after(self, model, before: dict, chosen_on: int = 0) -> dict:
        """The report's `evaluation`: `before`, the tuned model on the same rows, and what changed.

        `chosen_on`: how many of the first rows chose the step that is saved; the others are scored apart.
        """
        if not self.prompt.asks:
            change = {"before": before["perplexity"], "after": self._perplexity(model, "tuned")}
            return {"rows": len(self.examples), "perplexity": change}
        scores, earlier = self._scores(model, self.prompts, "tuned"), np.array(before["scores"])
        changed, answers = flips(earlier, scores, self.truth), self.prompt.answers
        # The most telling three: the two largest changes of mind for the better, the largest for the worse.
        telling = [("fixed", changed["fixed"][:2]), ("broken", changed["broken"][:1])]
        examples = [
            {
                "kind": kind,
                "truth": answers[self.truth[i]],
                "before": answers[int(earlier[i].argmax())],
                "after": answers[int(scores[i].argmax())],
                "text": last_words(self.held_out[i].text),
            }
            for kind, rows in telling
            for i in rows
        ]
        return {
            "rows": len(self.held_out),
            **{k: before[k] for k in UNTRAINED if before.get(k)},
            **self._tuned(scores.argmax(1).tolist(), chosen_on),
            "flips": {"fixed": len(changed["fixed"]), "broken": len(changed["broken"]), "examples": examples},
        }

    @property
    def scored(self) -> int:
        """Held-out rows that can be scored: of texts and chats those that are not too long."""
        return len(self.held_out) if self.prompt.asks else len(self.examples)

    def scorer(self, rows: int) -> Callable:
        """model -> {"loss"} of the first `rows`, and "accuracy" where they have labels: for --eval-steps.

        The loss is training's: the mean over supervised tokens.
        """
        base, autocast = self.base, self.base.hardware.autocast
        if not self.prompt.asks:
            few = self.examples[:rows]
            return lambda model: {"loss": e.perplexity(model, few, autocast)["loss"]}
        asked, truth = self.prompts[:rows], self.truth[:rows]
        answers = [p.answer_ids(base.tokenizer, self.prompt, i) for i in range(len(self.prompt.answers))]
        replies = [answers[label] for label in truth]
        few = [
            {"input_ids": ids + reply, "labels": [IGNORE] * len(ids) + reply}
            for ids, reply in zip(asked, replies)
        ]

        def score(model) -> dict:
            loss, said = e.loss_and_labels(model, few, answers, autocast)
            if said is None:  # answers that begin alike are told apart by their ends
                of_mine = lambda mine: list(e.score_labels(model, mine, answers, autocast).argmax(1))
                said = processes.shared_out(asked, of_mine)
            return {"loss": loss, "accuracy": sum(a == b for a, b in zip(said, truth)) / len(truth)}

        return score

    def score_now(self, model, who: str) -> dict:
        """An accuracy_report of the held-out rows, or their perplexity, of the model as it is now."""
        if self.prompt.asks:
            return self._report(self._scores(model, self.prompts, who).argmax(1).tolist())
        return self._perplexity(model, who)

    def _scores(self, model, prompts: list[list[int]], who: str) -> np.ndarray:
        return e.score_answers(self.base, model, self.prompt, prompts, who)

    def _tuned(self, predicted: list[int], chosen_on: int) -> dict:
        result = {"tuned": self._report(predicted)}
        if 0 < chosen_on < len(predicted):
            others = predicted[chosen_on:], self.truth[chosen_on:]
            result["tuned_on_others"] = e.accuracy_report(*others, self.prompt.answers)
        return result

    def _report(self, predicted: Sequence[int]) -> dict:
        return e.accuracy_report(predicted, self.truth, self.prompt.answers)

    def _perplexity(self, model, who: str) -> dict:
        with progress(len(self.examples), f"{who}, perplexity") as step:
            return e.perplexity(model, self.examples, self.base.hardware.autocast, step)

    def _zero_shot(self, model) -> dict:
        scores = self._scores(model, self.prompts, "base, zero-shot")
        return {"scores": scores.tolist(), "base_zero_shot": self._report(scores.argmax(1).tolist())}

    def _few_shot(self, model, train_rows: list[Row]) -> dict:
        prompt, tokenizer, shots = self.prompt, self.base.tokenizer, FEW_SHOT
        if prompt.answers != SENTIMENT_ANSWERS:
            shots = shortest(tokenizer, train_rows, len(FEW_SHOT))
        longest = prompt.max_length + len(p.sentiment_prompt(tokenizer, prompt, "", shots))
        if longest > self.base.context_length:
            limit = f"{longest} tokens, and the model reads {self.base.context_length}"
            note(f"note       no score with {len(shots)} examples: they make up to {limit}")
            return {"base_few_shot": None}
        prompts = [p.sentiment_prompt(tokenizer, prompt, row.text, shots) for row in self.held_out]
        scores = self._scores(model, prompts, f"base, {len(shots)} examples")
        return {"base_few_shot": self._report(scores.argmax(1).tolist()) | {"examples": len(shots)}}

    def _fingerprint(self, train_rows: list[Row], initial: Path | None = None) -> str:
        """sha256 of what a run asks and of whom: scores of one run say nothing about another."""
        rows = [[(row.text, row.label) for row in part] for part in (train_rows, self.held_out)]
        prompt = asdict(self.prompt)
        if not self.prompt.thinking:  # as it was before there was the setting
            del prompt["thinking"]
        asked = [prompt, self.base.info.revision, rows]
        if initial:  # the adapter that training goes on from
            asked.append(sha256_of(initial / WEIGHTS))
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def shortest(tokenizer, rows: list[Row], count: int) -> list[tuple[str, int]]:
    """(text, label) of the shortest rows, the labels in turn: examples where config.FEW_SHOT does not fit."""
    rows = evenly(sorted(rows, key=lambda row: len(row.text)), count)
    return [(p.shorten(tokenizer, row.text, 64), row.label) for row in rows]


def bag_of_words(train: list[Row], held_out: list[Row]) -> list[int]:
    """Predictions of TF-IDF (words and pairs) + logistic regression: what words alone can tell.

    It reads the whole review, while the language model reads what fits into max_length.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=10, max_iter=1000))
    try:
        model.fit([row.text for row in train], [row.label for row in train])
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        # Not one word of two letters: only the labels can be counted.
        return [statistics.mode(row.label for row in train)] * len(held_out)
    return model.predict([row.text for row in held_out]).tolist()


def flips(before: np.ndarray, after: np.ndarray, truth: Sequence[int]) -> dict:
    """Rows that training fixed and rows that it broke, each list with the largest change of mind first."""
    truth = np.asarray(truth)
    was, now = before.argmax(1) == truth, after.argmax(1) == truth
    order = np.argsort(-np.abs(_margin(after, truth) - _margin(before, truth)))
    fixed, broken = order[(now & ~was)[order]], order[(was & ~now)[order]]
    return {"fixed": fixed.tolist(), "broken": broken.tolist()}


def _margin(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """By how much (nats) the true answer leads the best other one."""
    rows = np.arange(len(truth))
    others = scores.copy()
    others[rows, truth] = -np.inf
    return scores[rows, truth] - others.max(1)


def last_words(text: str) -> str:
    """The end of a review, where the model looks, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else "… " + text[-300:]
