"""What the doctor asks, and what transformers and a server answer."""

import gc
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from openai_api import Endpoint, Reply
from qlora import prompts as p
from qlora.adapters import Adapter, load_trained, read_adapter
from qlora.cli import UsageError, UserError, note, progress
from qlora.control_tokens import has_control_tokens
from qlora.data import load_rows, source_of, split
from qlora.generation import generate
from qlora.hardware import detect, precision_of, return_freed_memory
from qlora.loading import SIXTEEN_OR_MORE, load_tokenizer
from qlora.sources import locate
from reference import scaled_by, scorer
from settings import DOCTOR_ROWS, FREE_PROMPTS, ParitySettings

FREE_TOKENS = 24  # of each free answer
AS_TRAINED = "as trained"


@dataclass
class Asked:
    """The questions of one adapter."""

    tokenizer: object
    talks: list[list[dict]]  # messages of each question; the free ones come last
    free: int  # how many of them are free prompts, whose answers are continued
    answers: tuple[str, ...] = ()
    answer_ids: tuple[int, ...] = ()  # the first token of each; () without labels
    ids: list[list[int]] = field(default_factory=list)  # each prompt's tokens, as training wrote them

    @property
    def scored(self) -> int:
        """Questions whose next token is compared: those with labels, or all."""
        return len(self.talks) - self.free if self.answer_ids else len(self.talks)


@dataclass
class Reference:
    """What transformers says: next-token log-probabilities (questions, vocabulary) by form and strength."""

    said: dict[tuple[str, float], np.ndarray]
    texts: dict[str, list[str]]  # of the free prompts, by form

    @property
    def first(self) -> str:
        """The likeliest form."""
        return next(iter(self.texts))


def read_asked(s: ParitySettings) -> tuple[Adapter, Asked]:
    """The adapter and what is asked: its held-out rows where it answers with labels, and free prompts."""
    adapter, name = read_adapter(s.adapter), f"--adapter {s.adapter}"
    prompt = adapter.prompt
    if prompt and prompt.objective == "lm":
        raise UsageError(f"{name} continues plain text; a server of chats can't be compared with it")
    folder = adapter.folder if (adapter.folder / "tokenizer_config.json").exists() else adapter.base_model
    tokenizer = load_tokenizer(tokenizer_folder(folder))
    if tokenizer.chat_template is None:
        raise UserError(f"{name}: its tokenizer has no chat template, so a server can't be asked the same")
    free = [[{"role": "user", "content": text}] for text in FREE_PROMPTS]
    if not (prompt and prompt.asks):
        return adapter, finished(Asked(tokenizer, free, len(free)))
    firsts = tuple(p.answer_ids(tokenizer, prompt, label)[0] for label in range(len(prompt.answers)))
    if len(set(firsts)) < len(firsts):
        raise UsageError(f"{name}: answers that begin with the same token can't be told apart by a server's")
    rows = held_out(adapter, min(s.eval_samples, DOCTOR_ROWS), name)
    talks = [p.arranged(tokenizer, p.fitted_messages(tokenizer, prompt, row.text)) for row in rows]
    kept = [talk for talk in talks if not has_control_tokens(tokenizer, talk)]
    if len(kept) < len(talks):
        note(f"note       {len(talks) - len(kept)} rows hold control tokens, which servers obey: not asked")
    return adapter, finished(Asked(tokenizer, kept + free, len(free), prompt.answers, firsts))


def tokenizer_folder(name) -> Path:
    return name if isinstance(name, Path) else locate(name)[0]


def held_out(adapter: Adapter, count: int, name: str) -> list:
    data = adapter.dataset
    if "name" not in data:
        raise UsageError(f"{name}: it does not say which rows were held out")
    count = min(count, data.get("eval_samples", count))
    return split(load_rows(source_of(data), data.get("columns")), 0, count, data["seed"])[1]


def finished(asked: Asked) -> Asked:
    asked.ids = [p.render(asked.tokenizer, talk, True) for talk in asked.talks]
    return asked


def ask_transformers(adapter: Adapter, asked: Asked) -> Reference:
    """Both forms of the base, one after the other."""
    reference = Reference({}, {})
    for form, precision in forms_of(adapter).items():
        model, base = load_trained(adapter, precision=precision)
        next_logprobs = scorer(model, base)
        for strength in strengths(adapter):
            title = f"{form}, adapter x {strength:.3g}"
            with scaled_by(model, strength), progress(asked.scored, title) as step:
                said = next_logprobs(asked.ids[: asked.scored], step)
            reference.said[form, strength] = np.asarray(said, dtype=np.float32)
        free = asked.ids[len(asked.ids) - asked.free :]
        ends = {
            "pad_token_id": base.tokenizer.pad_token_id,
            "eos_token_id": sorted(p.end_ids(base.tokenizer)),
        }
        written = [generate(model, [ids], FREE_TOKENS, **ends)[0] for ids in free]
        reference.texts[form] = base.tokenizer.batch_decode(written, skip_special_tokens=True)
        del model, base, next_logprobs
        gc.collect()
        return_freed_memory()
    return reference


def forms_of(adapter: Adapter) -> dict[str, str | None]:
    """{form: the base's precision}, the likeliest first; in what others trained their adapter is unknown."""
    plain = precision_of(detect("nf4").dtype)
    if adapter.base is None:
        return {f"over the base in {plain}": plain, "over the base in NF4": "nf4"}
    own_values = adapter.base.precision in SIXTEEN_OR_MORE or adapter.base.name.lower().endswith(".gguf")
    original = {} if own_values else {f"over the original base in {plain}": plain}
    return {AS_TRAINED: None, **original}


def strengths(adapter: Adapter) -> tuple[float, ...]:
    """1 first; rsLoRA's alpha/sqrt(r) read as alpha/r, and the other way round, come last."""
    wrong = math.sqrt(adapter.config.get("r", 8))
    return tuple(dict.fromkeys((1.0, 0.0, 0.5, 2.0, 1 / wrong, wrong)))


@dataclass
class Served:
    replies: list[Reply]  # to the scored questions
    prompts: list[list[int] | None]  # tokens that the server makes of every question
    base: list[Reply] | None  # the scored questions, by the server's base alone
    texts: list[str]  # of the free prompts
    few_bits: bool | None = False  # whether its weights are rounded to fewer than 7; None: it does not say


def ask_endpoint(there: Endpoint, asked: Asked) -> Served:
    scored, free = asked.talks[: asked.scored], asked.talks[len(asked.talks) - asked.free :]
    rows = len(scored) * (1 + bool(there.base_fields)) + len(free)
    served = Served([], [], [] if there.base_fields else None, [], there.few_bits)
    with progress(rows, f"{there.kind} server") as step:
        for talk in scored:
            served.prompts.append(there.prompt_ids(talk))
            served.replies.append(there.ask(talk, 4 if asked.answer_ids else 1))
            step(1)
        for talk in free:
            served.texts.append(there.ask(talk, FREE_TOKENS).text)
            step(1)
        for talk in scored if there.base_fields else ():
            served.base.append(there.ask(talk, 1, base=True))
            step(1)
    return served
