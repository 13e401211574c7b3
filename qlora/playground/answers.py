"""Base and adapter answer the same prompt, in one batch of two, token by token."""

import inspect
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora import generation, prompts
from qlora.adapters import Adapter
from qlora.cli import UserError
from qlora.generation import Sampling
from qlora.logits import causal_lm
from qlora.playground.models import Models

BASE = "__base__"  # PEFT's word for a row without an adapter


@dataclass
class Asked:
    """What is sent to the model, by whom it is answered, and how."""

    ids: list[int]
    adapter: Adapter | None
    prompt: prompts.PromptFormat | None  # the adapter's, unless it is sent as an ordinary message
    length: int  # tokens of the answer at the most
    sampling: Sampling
    is_cut: bool = False  # the text's beginning did not fit


@dataclass
class Reply:
    """How far the answers have come; the rows are the base and, where there is one, the adapter."""

    texts: list[str]
    logits: Tensor  # (rows, vocabulary) after the prompt, fp32 on the CPU
    first_seconds: float  # from the call to the first token
    tokens: list[list[int]] = field(default_factory=list)  # of each row, the end token included
    seconds: float = 0.0  # of reading and writing, so far


def ask(models: Models, name: str | None, text: str, plain: bool, how: tuple[int, Sampling]) -> Asked:
    """The prompt as the adapter's training wrote it, or with `plain` an ordinary message.

    `name`: of an adapter, None for the base alone. `how`: (length, sampling). Raises UserError where there
    is no text, or too much of it.
    """
    adapter, (length, sampling) = models.adapters.get(name), how
    if not text.strip():
        raise UserError("there is no text: type something first")
    prompt = None if plain or not adapter else adapter.prompt
    ids, is_cut = prompts.typed_ids(models.base.tokenizer, prompt, text)
    if len(ids) + length > models.base.context_length:
        both = f"the prompt's {len(ids)} tokens and {length} new ones"
        raise UserError(f"{both} are over the {models.base.context_length} that the model reads: shorten it")
    return Asked(ids, adapter, prompt, length, sampling, is_cut)


class Reader:
    """Reads tokens (rows, tokens), and returns the logits (rows, vocabulary) after them; keeps the cache.

    Without an adapter there is one row. With one the rows are the base and the adapter: one pass over the
    weights serves both, but for the adapters that PEFT can't give a row of their own (see shares_batches).
    """

    def __init__(self, models: Models, adapter: Adapter | None):
        self.models, self.caches = models, {}
        model = models.model
        lm = causal_lm(model)
        # Logits of the whole prompt would cost as much again as some of the layers.
        known = inspect.signature(type(lm).forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        if adapter is None:
            self.passes = [(slice(0, 1), nullcontext, {})]
            return
        model.set_adapter(adapter.peft_name)
        together = {"adapter_names": [BASE, adapter.peft_name]}
        apart = [(slice(0, 1), model.disable_adapter, {}), (slice(1, 2), nullcontext, {})]
        shared = shares_batches(model, adapter.peft_name)
        self.passes = [(slice(0, 2), nullcontext, together)] if shared else apart

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        model, found = self.models.model, []
        for i, (rows, switched, named) in enumerate(self.passes):
            with self.models.lock, switched():
                out = model(
                    input_ids=ids[rows].to(next(model.parameters()).device),
                    past_key_values=self.caches.get(i),
                    use_cache=True,
                    **self.options,
                    **named,
                )
            self.caches[i] = out.past_key_values
            found.append(out.logits[:, -1].float().cpu())
        return torch.cat(found)


def shares_batches(model, name: str) -> bool:
    """Whether PEFT lets an adapter share a batch with the base: not DoRA, nor one trained by a grid."""
    return not any(
        name in getattr(module, "lora_variant", ()) or name in getattr(module, "grids", ())
        for module in model.modules()
    )


def reply(models: Models, asked: Asked) -> Iterator[Reply]:
    """The same object after each token, until all rows have ended."""
    tokenizer, resumed = models.base.tokenizer, time.perf_counter()
    reader, ends = Reader(models, asked.adapter), prompts.end_ids(tokenizer)
    ids = torch.tensor([asked.ids] * (1 + (asked.adapter is not None)))
    so_far = None
    for chosen, logits in generation.steps(reader, ids, asked.length, asked.sampling, ends):
        took = time.perf_counter() - resumed
        so_far = so_far or Reply([""] * len(ids), logits, took, [[] for _ in ids])
        for i, token in enumerate(chosen):
            if not ends.intersection(so_far.tokens[i][-1:]):
                so_far.tokens[i].append(token)
        so_far.texts = tokenizer.batch_decode(so_far.tokens, skip_special_tokens=True)
        so_far.seconds += took
        yield so_far
        resumed = time.perf_counter()  # what is done with a token takes time of its own


def warm_up(models: Models) -> None:
    """One short answer: the first one after loading waits for memory pages and kernels."""
    ids = prompts.typed_ids(models.base.tokenizer, None, "Hello")[0]
    for adapter in models.adapters.values() or [None]:
        for _ in reply(models, Asked(ids, adapter, None, 2, Sampling())):
            pass
        return
