"""One small fine-tuning, from rows to a deployed model. A bug replaces one of its parts."""

import contextlib
import functools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from transformers import set_seed

from config import BUNDLED, MAX_GRAD_NORM, SENTIMENT_ANSWERS, TrainSettings
from qlora import adapters, batches, evaluation, prompts
from qlora.cli import note
from qlora.data import Row, load_rows, split
from qlora.fast import make_fast
from qlora.files import seal
from qlora.hardware import detect
from qlora.loading import Base, BaseInfo, load_base
from qlora.logits import last_logits, loss_at_labels
from qlora.lora import lora_config
from qlora.merging import merged_model

BATCH = 4
DEPLOYED = ("write", "ask", "score", "onto")  # parts that come after training


@functools.cache
def reviews():
    """One-sentence reviews, duplicates removed: short rows make quick steps."""
    return load_rows("rotten_tomatoes")


def split_rows(train: int, held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    return split(reviews(), train, held_out, seed)


def encode(tokenizer, prompt, rows: list[Row]) -> list[dict]:
    return batches.encode_rows(tokenizer, prompt, rows, "training")


def score(model, asked: list[list[int]], answers: list[list[int]]) -> np.ndarray:
    """log P of each answer after each prompt, several prompts at once -> (prompts, answers)."""
    return evaluation.score_labels(model, asked, answers, contextlib.nullcontext)


@dataclass(frozen=True)
class Job:
    """What is asked for, and how each part is done."""

    model: str = BUNDLED
    precision: str = "nf4"
    lane: str = "fp32"  # how products are computed; "": transformers, PEFT and bitsandbytes as they are
    rows: int = 64
    held_out: int = 24
    max_length: int = 96
    steps: int = 16
    rate: float = 1e-3
    variant: str = "lora"
    alpha: int = 32
    seed: int = 42
    split: Callable = split_rows  # (rows, held-out rows, seed) -> both
    encode: Callable = encode  # (tokenizer, prompt, rows) -> [{input_ids, labels}]
    collate: Callable = batches.collate  # (some of these, pad id) -> a batch
    prepare: Callable = lambda model: None  # what is done to the model once it is loaded
    # The deployed program's parts:
    write: Callable = lambda folder: None  # what happens to the adapter's folder on its way
    ask: Callable = prompts.sentiment_prompt  # (tokenizer, prompt, text) -> token ids
    score: Callable = score
    onto: str = ""  # the adapter is merged into this base, in 16 bits or more; "": it stays beside its own


@dataclass
class Run:
    """A finished training, and the deployed adapter beside it in one model."""

    job: Job
    base: Base
    prompt: prompts.PromptFormat
    model: torch.nn.Module
    train_rows: list[Row]
    held_out: list[Row]
    examples: list[dict]
    log: list[dict] = field(default_factory=list)  # what step() returns, with its number
    batches: list[dict] = field(default_factory=list)  # what each step was given
    folder: Path | None = None  # of the deployed adapter
    merged: torch.nn.Module | None = None  # with job.onto
    merged_base: BaseInfo | None = None
    known: dict[str, np.ndarray] = field(default_factory=dict)  # scores of the held-out rows, by who

    @property
    def tokenizer(self):
        return self.base.tokenizer

    @property
    def losses(self) -> list[float]:
        """As transformers' Trainer logs them: in place of a loss that is not finite the mean so far.

        That is its default, logging_nan_inf_filter; qlora_finetune.py switches it off.
        """
        shown: list[float] = []
        for step in self.log:
            finite = math.isfinite(step["loss"])
            shown.append(step["loss"] if finite else sum(shown) / max(1, len(shown)))
        return shown

    @contextlib.contextmanager
    def acting_as(self, who: str) -> Iterator[torch.nn.Module]:
        """The model as "base", "trained" or "deployed"."""
        self.model.set_adapter("deployed" if who == "deployed" and not self.merged else "default")
        with self.model.disable_adapter() if who == "base" else contextlib.nullcontext():
            yield self.merged if who == "deployed" and self.merged else self.model
        self.model.set_adapter("default")

    def answers(self) -> list[list[int]]:
        count = range(len(self.prompt.answers))
        return [prompts.answer_ids(self.tokenizer, self.prompt, label) for label in count]

    def asked(self, who: str, rows: list[Row] | None = None) -> list[list[int]]:
        """Token ids of the held-out rows' prompts, as training made them or as the deployed program does."""
        ask = self.job.ask if who == "deployed" else prompts.sentiment_prompt
        return [ask(self.tokenizer, self.prompt, row.text) for row in rows or self.held_out]

    def scores(self, who: str, rows: list[Row] | None = None) -> np.ndarray:
        """log P of each answer (rows, answers); those of the held-out rows are computed once."""
        if rows is None and who in self.known:
            return self.known[who]
        with self.acting_as(who) as model:
            by = self.job.score if who == "deployed" else score
            found = by(model, self.asked(who, rows), self.answers())
        if rows is None:
            self.known[who] = found
        return found

    def odds(self, who: str) -> np.ndarray:
        """log P(positive) - log P(negative) of each held-out row."""
        no, yes = self.scores(who).T
        return yes - no

    def right(self, who: str, rows: list[Row] | None = None) -> str:
        """'19 of 24': rows whose likelier answer is the true one."""
        said = self.scores(who, rows).argmax(1)
        rows = rows or self.held_out
        return f"{sum(a == row.label for a, row in zip(said, rows))} of {len(rows)}"

    def answer_loss(self, who: str) -> float:
        """Mean -log P of the true answers."""
        scores = self.scores(who)
        return float(-np.mean([scores[i, row.label] for i, row in enumerate(self.held_out)]))


def with_lora(job: Job) -> tuple[Base, torch.nn.Module]:
    """(base, the same with fresh adapters)"""
    base = load_base(job.model, job.precision, detect(job.precision, "cpu", job.lane or "fp32"))
    job.prepare(base.model)
    set_seed(job.seed)
    wanted = TrainSettings(lora_variant=job.variant, lora_alpha=job.alpha)
    model = get_peft_model(base.model, lora_config(base.model, wanted, begins=True))
    if job.lane:
        make_fast(model, job.lane)
    else:
        loss_at_labels(base.model)
    return base, model


def train(job: Job) -> Run:
    note(f"           training: {job.steps} steps of {BATCH} reviews …")
    base, model = with_lora(job)
    prompt = prompts.choose_format("sentiment", "labels", SENTIMENT_ANSWERS, job.max_length)
    rows, held_out = job.split(job.rows, job.held_out, job.seed)
    run = Run(job, base, prompt, model, rows, held_out, job.encode(base.tokenizer, prompt, rows))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    for number in range(job.steps):
        first = number * BATCH % len(run.examples)
        batch = job.collate(run.examples[first : first + BATCH], base.tokenizer.pad_token_id)
        if not number:  # the base is scored before training, as a real run does
            last_logits(model, batch["input_ids"], contextlib.nullcontext)
        rate = job.rate * min(1.0, (number + 1) / 2) * (1 - number / job.steps)
        run.log.append({"step": number + 1, **step(model, batch, trained, (optimizer, rate))})
        run.batches.append(batch)
    return run


def step(model, batch: dict, trained: list, how: tuple) -> dict:
    """One update; as with a gradient scaler none where a gradient is not finite."""
    optimizer, rate = how
    optimizer.param_groups[0]["lr"] = rate
    model.train()
    loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM).item()
    if applied := math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.item(), "grad_norm": norm, "learning_rate": rate, "applied": applied}


def deploy(run: Run, job: Job, folder: Path) -> Run:
    """Write the adapter, let the deployed program's parts of `job` do what they do, and load it again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of keys that are missing, and goes on
        run.model.peft_config["default"].base_model_name_or_path = run.base.info.public_name
        run.model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        rows = {
            "name": "rotten_tomatoes",
            "seed": job.seed,
            "samples": job.rows,
            "eval_samples": job.held_out,
        }
        adapters.save_notes(folder, run.prompt, run.base.info, rows)
        run.tokenizer.save_pretrained(folder)
        job.write(folder)
        seal(folder)
        if "deployed" in run.model.peft_config:
            run.model.delete_adapter("deployed")
        run.model.load_adapter(str(folder), "deployed", is_trainable=False)
        run.model.set_adapter("default")
    known = {who: scores for who, scores in run.known.items() if who != "deployed"}
    run = replace(run, job=job, folder=folder, merged=None, known=known)
    if job.onto:
        other = load_base(job.onto, job.precision, run.base.hardware)
        run.merged, _ = merged_model("dequantized", adapters.read_adapter(folder), other, "fp32")
        run.merged_base = other.info
    return run


def same_training(one: Job, other: Job) -> bool:
    """Whether two jobs differ in the deployed program's parts only."""
    parts = [f.name for f in fields(Job) if f.name not in DEPLOYED]
    return all(getattr(one, name) == getattr(other, name) for name in parts)


@contextlib.contextmanager
def work(job: Job) -> Iterator[Run]:
    """Train and deploy; the folder of the adapter is deleted at the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield deploy(train(job), job, Path(folder) / "adapter")
