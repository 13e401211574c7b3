"""The smallest real things: a two-layer Llama, forty reviews, two programs, and a reference run of each."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trials.runner import Done, Job, Process
from trials.verdicts import SURVIVED, Verdict, check_answer, check_end

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "adapter_model.safetensors"
STEPS = 3  # two checkpoints are kept: the third deletes the first
REVIEW = "Dull, badly acted and far too long. I want my two hours back."
# A chat format as SmolLM2 and Qwen write it.
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


LOST = Verdict("lost")


@dataclass
class System:
    """A program under test. Its run trains into a folder; the same command again, or --resume, continues."""

    name: str
    work: Path
    baseline: Path = None  # a finished run
    interrupted: Path = None  # one that was killed after its second checkpoint
    sha256: str = ""  # of the finished run's adapter
    seconds: float = 0.0  # that a run takes
    reference: Done = None  # what the finished run answers

    @property
    def ours(self) -> bool:
        return self.name == "qlora"

    def train(self, out, resume: bool = False, model=None, data=None, extra: tuple = (), **options) -> Job:
        model, data = model or self.work / "tiny", data or self.work / "reviews.csv"
        if not self.ours:
            return Job("plain_trainer", ["train", model, data, out], **options)
        flags = [
            "--model",
            model,
            "--dataset",
            data,
            "--samples",
            16,
            "--eval-samples",
            8,
            "--max-length",
            96,
        ]
        flags += ["--batch-size", 4, "--max-steps", STEPS, "--save-steps", 1, "--lora-dropout", 0.1]
        flags += ["--learning-rate", 0.005, "--output-dir", out, *["--resume"] * resume, *extra]
        return Job("qlora_finetune", flags, **options)

    def answer(self, adapter, model=None, extra: tuple = (), **options) -> Job:
        options = {"hash_logits": True, **options}
        if not self.ours:
            return Job("plain_trainer", ["answer", adapter, REVIEW, *[model] * bool(model)], **options)
        named = ["--model", model] if model else []
        flags = ["--adapter", adapter, *named, "--max-new-tokens", 4, *extra, REVIEW]
        return Job("qlora_inference", flags, **options)


@dataclass
class World:
    """Where trials happen. Built once; each trial gets a folder of its own, deleted afterwards."""

    work: Path
    seed: int
    qlora: System = None
    plain: System = None
    server: object = None  # trials.serving.Server
    operations: dict = field(default_factory=dict)  # of a run: system's name -> ["open …", …]

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder."""
        path = self.work / f"trial-{os.getpid()}-{random.getrandbits(40):010x}"
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def start(self, job: Job) -> Process:
        return Process(job, self.work)

    def call(self, job: Job, **wait) -> Done:
        return self.start(job).wait(**wait)

    def check_resumed(self, system: System, out: Path, refusal=LOST, **options) -> Verdict:
        """After a fault: does the run go on to the same bytes, is nothing left over, does it answer the same?

        `refusal` is what a refusal to resume counts as.
        """
        done = self.call(system.train(out, resume=True, **options))
        verdict = check_end(done)
        if not verdict.survived:
            return verdict
        if done.code:
            return Verdict(refusal.name, f"--resume refused: {done.last_line}")
        if not (out / WEIGHTS).exists():
            return Verdict("lost", f"resumed, but there is no adapter; {done.last_line}")
        if sha256_of(out / WEIGHTS) != system.sha256:
            return Verdict("silently wrong", "resumed to another adapter than the uninterrupted run's")
        if left := leftovers(out):
            return Verdict("other", f"left over: {left[0]}")
        answered = self.call(system.answer(out))
        if system.ours and answered.code:
            return Verdict("lost", f"resumed, but inference says: {answered.last_line}")
        return check_answer(answered, system.reference)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(out: Path) -> list[str]:
    """Unfinished folders under their own names: none may be there after a run."""
    return sorted(
        p.name for p in out.iterdir() if p.name.startswith((".qlora-part", ".staging", ".settings"))
    )


def checkpoints(out: Path) -> list[Path]:
    """Newest first."""
    return sorted(out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)


def import_everything() -> None:
    """What a trial needs, so that its fork has it. The libraries' own messages are not wanted here."""
    sys.path[:0] = [p for p in (str(ROOT), str(Path(__file__).parent)) if p not in sys.path]
    import matplotlib.pyplot  # noqa: F401
    import plain_trainer  # noqa: F401

    import qlora_finetune
    import qlora_inference

    qlora_finetune.import_libraries()
    qlora_inference.import_libraries()


def make_world(work: Path, seed: int) -> World:
    """The model and the data; no runs yet."""
    work.mkdir(parents=True, exist_ok=True)
    write_reviews(work / "reviews.csv")
    in_a_fork(lambda: make_tiny(work / "tiny"))
    return World(work, seed, System("qlora", work), System("plain", work))


def add_references(world: World, names: tuple) -> None:
    """Run the programs once undisturbed: what a resumed run must end with, what an adapter must answer."""
    for system in (getattr(world, name) for name in names):
        system.baseline = world.work / f"{system.name}-finished"
        done = world.call(system.train(system.baseline))
        if done.code != 0:
            raise SystemExit(f"error: the undisturbed run of {system.name} failed: {done.err[-2000:]}")
        system.seconds, system.sha256 = done.seconds, sha256_of(system.baseline / WEIGHTS)
        system.reference = world.call(system.answer(system.baseline))
        if system.reference.code != 0 or not system.reference.logits:
            raise SystemExit(f"error: {system.name} does not answer: {system.reference.err[-2000:]}")
        system.interrupted = interrupt(world, system)


def interrupt(world: World, system: System) -> Path:
    """A run that was killed once its second checkpoint was there (a slow machine may have made a third)."""
    out = world.work / f"{system.name}-interrupted"
    process = world.start(system.train(out))
    while not _is_json(out / "checkpoint-2" / "trainer_state.json"):  # the last file that Trainer writes
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for left in leftovers(out):
        shutil.rmtree(out / left, ignore_errors=True)
    return out


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except (OSError, ValueError):
        return False


def in_a_fork(work) -> None:
    """Call something in a child, so that this process stays without threads."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("error: the trials' model could not be made")


def write_reviews(path: Path) -> None:
    good, bad = "a warm and funny film, I loved it", "dull and far too long, avoid it"
    rows = [(f"Review {i}: {good if i % 2 else bad}.", ("neg", "pos")[i % 2]) for i in range(40)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def make_tokenizer():
    """Byte-level BPE with 400 tokens, so that files are small; with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(
        [REVIEW, "You judge movie reviews. Negative Positive system user assistant"], trainer
    )
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE, **named)


def make_tiny(folder: Path, tokenizer=None, **overrides) -> Path:
    """A random Llama of two layers with 64 channels; `overrides` go to its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or make_tokenizer()
    torch.manual_seed(0)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
    }
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config["tie_word_embeddings"] = True
    LlamaForCausalLM(LlamaConfig(**{**config, **overrides})).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def survived(detail: str = "") -> Verdict:
    return Verdict(SURVIVED, detail)
