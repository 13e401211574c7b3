"""The parity ladder's questions, asked of a model in transformers: the one that was trained, and the same merged to 16 bits."""

from __future__ import annotations

import json
import math
import time

import torch
from peft.tuners.lora import LoraLayer
from transformers import GenerationConfig

from qlora import prompts as p
from qlora.before_after import progress
from qlora.evaluation import score_labels
from qlora.logits import causal_lm
from qlora.parity import Exam, Reference

TIMED = 32  # reviews on which prefill is timed


def ask_transformers(model, exam: Exam, hardware, load_seconds: float | None, title: str) -> Reference:
    every_token = [[i] for i in range(causal_lm(model).get_output_embeddings().weight.shape[0])]
    prompts = [p.render(exam.tokenizer, messages, True) for messages in exam.messages]
    free = [p.render(exam.tokenizer, messages, True) for messages in exam.free]
    with progress(len(prompts), title) as step:
        logprobs = score_labels(model, prompts, every_token, hardware.autocast, step)
    started = time.perf_counter()
    for ids in prompts[:TIMED]:  # one at a time, as the server gets them
        score_labels(model, [ids], every_token, hardware.autocast)
    prefill = sum(map(len, prompts[:TIMED])) / (time.perf_counter() - started)
    texts, decode = continue_freely(model, exam.tokenizer, free, exam.free_tokens)
    no, yes = exam.answer_ids
    return Reference(prompts + free, logprobs[:, yes] - logprobs[:, no], list(logprobs), list(score_labels(model, free, every_token, hardware.autocast)), texts,
                     load_seconds, prefill, decode)


def continue_freely(model, tokenizer, prompts: list[list[int]], length: int) -> tuple[list[str], float]:
    """(greedy texts of `length` tokens, tokens per second after the first one)."""
    def generate(ids, tokens):
        config = GenerationConfig(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=next(model.parameters()).device)
            started = time.perf_counter()
            out = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config)[0, len(ids):].tolist()
            return out, time.perf_counter() - started

    generate(prompts[0], 2)  # the first call prepares kernels
    texts, seconds = [], 0.0
    for ids in prompts:
        _, first = generate(ids, 1)
        tokens, all_of_it = generate(ids, length)
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True))
        seconds += all_of_it - first
    return texts, len(prompts) * (length - 1) / seconds


def at_other_strengths(model, adapter, trained: Reference, hardware, rows: int = 8) -> dict:
    """{strength: logprobs of the first rows}: what a lost or wrongly scaled adapter would say."""
    r = json.loads((adapter.folder / "adapter_config.json").read_text())["r"]
    every_token = [[i] for i in range(len(trained.next[0]))]
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    kept = [dict(layer.scaling) for layer in layers]
    rows = min(rows, len(trained.odds))
    scaled = {1: trained.next[:rows]}
    with model.disable_adapter():
        scaled[0] = score_labels(model, trained.prompts[:rows], every_token, hardware.autocast)
    for strength in (1 / math.sqrt(r), math.sqrt(r)):
        for layer, scaling in zip(layers, kept):
            layer.scaling.update({name: value * strength for name, value in scaling.items()})
        scaled[strength] = score_labels(model, trained.prompts[:rows], every_token, hardware.autocast)
    for layer, scaling in zip(layers, kept):
        layer.scaling.update(scaling)
    return scaled
