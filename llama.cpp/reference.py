"""The questions of the parity ladder, and the trained model's replies to them, in transformers."""

import contextlib
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peft.tuners.lora import LoraLayer

from ladder import SPEED, Replies
from qlora import prompts as p
from qlora.adapters import Adapter, load_trained, read_adapter
from qlora.cli import UsageError, UserError, note, progress
from qlora.data import load_rows, source_of, split
from qlora.evaluation import score_labels
from qlora.fast import make_fast
from qlora.generation import generate
from qlora.hardware import return_freed_memory
from qlora.loading import Base, load_base, load_tokenizer
from qlora.logits import causal_lm
from qlora.merging import Kept, copy_dequantized, merged_model
from settings import BIN, FREE_PROMPTS, FREE_TOKENS, PROVED, SURVIVAL_ROWS, ParitySettings, why_not_built

TIMED = 32  # reviews on which prefill is timed
SCALED_ROWS = 16  # reviews that are asked again with the adapter at other strengths


@dataclass
class Questions:
    tokenizer: object
    reviews: list[list[dict]]  # messages of each held-out row
    free: list[list[dict]]  # messages of each free prompt
    truth: list[int]  # label of each row
    answers: tuple[str, ...]
    answer_ids: tuple[int, int]  # first token of each answer
    free_tokens: int  # how far the free prompts are continued
    context: int  # tokens that hold the longest prompt and its continuation


def read_questions(s: ParitySettings) -> tuple[Adapter, Questions]:
    """The checked adapter and its held-out rows as questions; raises UserError if they can't be asked."""
    adapter, name = read_adapter(s.adapter), f"--adapter {s.adapter}"
    prompt, data = adapter.prompt, adapter.dataset
    if prompt is None or not prompt.asks:
        raise UsageError(f"{name}: parity is measured on labels, and this adapter was not trained on labels")
    if not (BIN / "llama-server").exists() or not PROVED.is_file():
        raise UserError(why_not_built())
    tokenizer = load_tokenizer(adapter.folder)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{name}: its tokenizer has no chat template, which llama-server needs to ask the same"
        )
    first = tuple(p.answer_ids(tokenizer, prompt, label)[0] for label in range(len(prompt.answers)))
    if len(first) != 2 or first[0] == first[1]:
        answers = ", ".join(prompt.answers)
        raise UsageError(f"{name}: parity needs two answers that differ in their first token, not {answers}")
    found = load_rows(source_of(data), data.get("columns"))
    if len(found.answers) != 2:
        labels = ", ".join(found.answers) or "none"
        raise UserError(f"{name}: {data['name']} has changed since training; its labels are now: {labels}")
    if s.eval_samples > data["eval_samples"]:
        note(f"note       {data['eval_samples']} rows were held out in training; those are used")
    _, rows = split(found, 1, min(s.eval_samples, data["eval_samples"]), data["seed"])
    note(f"data       {found.origin}: {len(rows)} held-out rows, {len(FREE_PROMPTS)} free prompts")
    reviews = [p.arranged(tokenizer, p.fitted_messages(tokenizer, prompt, row.text)) for row in rows]
    free = [[{"role": "user", "content": text}] for text in FREE_PROMPTS]
    truth, context = [row.label for row in rows], max(prompt.max_length, 128) + FREE_TOKENS
    return adapter, Questions(tokenizer, reviews, free, truth, prompt.answers, first, FREE_TOKENS, context)


def ask_trained(
    adapter: Adapter, questions: Questions, title: str, aside: Path
) -> tuple[Replies, Replies, Kept]:
    """Replies of the model as it was trained and of the same merged to 16 bits, and what that merge keeps.

    Both with their base's. The merge, and the base's trained-on values in its dtype, become the folders
    `aside`/merged and `aside`/base.
    """
    started = time.perf_counter()
    model, base = load_trained(adapter)
    load_seconds = time.perf_counter() - started
    trained = ask(model, base, questions, title, load_seconds)
    with scaled_by(model, 0):  # of an adapter trained through a grid the base is rounded, too
        trained.base = label_odds(model, base, questions, "base")
    trained.scaled = at_other_strengths(model, base, questions, adapter.config["r"])
    merged, kept = merged_model("dequantized", adapter, base)
    write_plain(merged, base, aside / "merged")
    make_fast(merged)
    replies = ask(merged, base, questions, f"merged {kept.dtype}")
    del merged
    alone = load_base(base.info.name, kept.dtype, base.hardware, base.info.revision or None).model
    copy_dequantized(base.model, alone)
    write_plain(alone, base, aside / "base")
    make_fast(alone)
    replies.base = label_odds(alone, base, questions, f"base in {kept.dtype}")
    del model, base, alone  # the servers need the memory
    gc.collect()
    return_freed_memory()
    return trained, replies, kept


def write_plain(model, base: Base, folder: Path) -> None:
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def ask(model, base: Base, questions: Questions, title: str, load_seconds: float | None = None) -> Replies:
    reviews = [p.render(base.tokenizer, messages, True) for messages in questions.reviews]
    free = [p.render(base.tokenizer, messages, True) for messages in questions.free]
    next_logprobs = scorer(model, base)
    with progress(len(reviews), title) as step:
        logprobs = next_logprobs(reviews, step)
    started = time.perf_counter()
    for ids in reviews[:TIMED]:  # one at a time, as the server gets them
        next_logprobs([ids])
    prefill = sum(map(len, reviews[:TIMED])) / (time.perf_counter() - started)
    free_next = list(next_logprobs(free))
    texts, decode = continue_freely(model, base, free, questions.free_tokens)
    no, yes = questions.answer_ids
    odds = logprobs[:, yes] - logprobs[:, no]
    speed = dict(zip(SPEED, (load_seconds, prefill, decode)))
    return Replies(reviews + free, odds, list(logprobs), free_next, texts, speed)


def label_odds(model, base: Base, questions: Questions, title: str = "", rows=SURVIVAL_ROWS) -> np.ndarray:
    """log P(second answer) - log P(first) of the first reviews (rows,), with a progress bar."""
    reviews = [p.render(base.tokenizer, messages, True) for messages in questions.reviews[:rows]]
    answers = [[token] for token in questions.answer_ids]
    with progress(len(reviews), title) as step:
        no, yes = score_labels(model, reviews, answers, base.hardware.autocast, step).T
    return yes - no


def scorer(model, base: Base) -> Callable:
    """A function of prompts: log-probabilities (prompts, vocabulary) of the next token."""
    every_token = [[i] for i in range(causal_lm(model).get_output_embeddings().weight.shape[0])]
    return lambda prompts, *step: score_labels(model, prompts, every_token, base.hardware.autocast, *step)


def continue_freely(model, base: Base, prompts: list[list[int]], length: int) -> tuple[list[str], float]:
    """(greedy texts of `length` tokens, tokens per second after the first one)."""
    ends = {"pad_token_id": base.tokenizer.pad_token_id, "eos_token_id": base.tokenizer.eos_token_id}

    def timed(ids: list[int], tokens: int) -> tuple[list[int], float]:
        started = time.perf_counter()
        (out,) = generate(model, [ids], tokens, min_new_tokens=tokens, **ends)
        return out, time.perf_counter() - started

    timed(prompts[0], 2)  # the first call prepares kernels
    texts, seconds = [], 0.0
    for ids in prompts:
        (_, first), (tokens, whole) = timed(ids, 1), timed(ids, length)
        texts.append(base.tokenizer.decode(tokens, skip_special_tokens=True))
        seconds += whole - first
    return texts, len(prompts) * (length - 1) / seconds


def at_other_strengths(model, base: Base, questions: Questions, r: int) -> dict[float, np.ndarray]:
    """{strength: log-odds of the first rows}: what a lost or wrongly scaled adapter would say."""
    scaled = {}
    for strength in (0, 1 / math.sqrt(r), 0.5, 1, 2, math.sqrt(r)):
        title = f"adapter at {strength:.3g} of its strength"
        with scaled_by(model, strength):
            scaled[strength] = label_odds(model, base, questions, title, SCALED_ROWS)
    return scaled


@contextlib.contextmanager
def scaled_by(model, strength: float):
    """While this is open, the adapter adds so many times what it was trained to add."""
    kept = [(m.scaling, dict(m.scaling)) for m in model.modules() if isinstance(m, LoraLayer)]
    try:
        for scaling, values in kept:
            scaling.update({name: value * strength for name, value in values.items()})
        yield
    finally:
        for scaling, values in kept:
            scaling.update(values)
