"""Precisions side by side: the same text through the same model, loaded anew in one precision after the other."""

from __future__ import annotations

import gc
import math
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from config import COMPARABLE
from qlora import prompts as p
from qlora.cli import UsageError, UserError, note, require
from qlora.compare_pictures import FOUR_BIT, findings, format_row, print_header
from qlora.data import load_rows, split
from qlora.encoding import choose_format
from qlora.evaluation import accuracy_report, score_labels
from qlora.hardware import Hardware, detect, return_freed_memory
from qlora.loading import first_line, locate, refuse_pickles
from qlora.logits import hidden_states
from qlora.precisions import emulated, load
from qlora.weights import dequantized, held_bytes, linear_layers

TEXT_ROWS, TEXT_TOKENS = 4, 256  # of held-out reviews: perplexity and prefill
KL_ROWS = 2  # of these, whose reference distributions are kept: 512 positions x 49152 tokens in fp32 are 0.1 GB
EVAL_TOKENS = 96  # per review, question included
PROMPT_TOKENS, DECODE_TOKENS, DECODE_SECONDS = 16, 16, 6.0  # decoding stops at what comes first


def compare(name: str, precisions: Sequence[str], eval_samples: int, seed: int) -> dict:
    """Print one row per precision as soon as it is measured, then what the rows say.

    Returns {reference, text, rows, errors, findings}: rows hold the figures or a `reason`, errors the relative error of each
    linear layer in the 4-bit rows.
    """
    unknown = [precision for precision in precisions if precision not in COMPARABLE]
    if unknown or not precisions:
        raise UsageError(f"--compare {' '.join(unknown)}: choose from {', '.join(COMPARABLE)}")
    require(eval_samples > 0, f"--eval-samples {eval_samples}: at least 1")
    hardware, folder = detect(), locate(name)[0]
    refuse_pickles(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text, questions = held_out(tokenizer, eval_samples, seed)
    ordered = [precision for precision in COMPARABLE if precision in precisions]  # highest first: it becomes the reference
    left = [precision for precision in COMPARABLE if precision not in precisions]
    for precision in ordered:
        if emulated(precision, hardware):
            note(f"note       this device has no arithmetic in {precision}: each product converts it first")
    if left:
        note(f"note       left out: {', '.join(left)} (each can be measured by its name)")
    result: dict = {"reference": None, "text": {"rows": len(text), "tokens_per_row": text.shape[1], "kl_positions": text[:KL_ROWS].numel(),
                    "eval_rows": eval_samples, "eval_tokens": EVAL_TOKENS, "decode_tokens": DECODE_TOKENS, "seed": seed}, "rows": [], "errors": {}}
    print_header(f"{name} on {hardware.name}", result["text"])
    nats, reference = {}, []
    for precision in tqdm(ordered, desc="compare", unit="precision", leave=False):
        try:
            row, nats[precision], errors = measure(folder, precision, hardware, text, questions, reference)
        except Exception as error:  # whatever a library says of a precision that it can't run here is that row's result
            row = {"precision": precision, "reason": first_line(error)}
            if result["reference"] is None:
                reference.clear()
        else:
            result["reference"] = result["reference"] or precision
            result["errors"].update({precision: errors} if precision in FOUR_BIT else {})
        result["rows"].append(row)
        tqdm.write(format_row(row, result["reference"]), file=sys.stdout)
        release(hardware)
    measured = {row["precision"]: row for row in result["rows"] if "reason" not in row}
    if not measured:
        raise UserError(f"{name}: no precision could be measured ({result['rows'][0]['reason']})")
    result["findings"] = findings(measured, nats, most_values(folder))
    return result


def held_out(tokenizer, eval_samples: int, seed: int) -> tuple[torch.Tensor, tuple]:
    """Token ids of IMDB reviews (rows, tokens), and (prompts, answers, truth, names) of the zero-shot question."""
    found = load_rows("imdb")
    rows = split(found, 0, max(eval_samples, 64), seed)[1]  # the same that training holds out, and in the same order
    texts = [ids for row in rows if len(ids := tokenizer(p.clean(row.text))["input_ids"]) >= TEXT_TOKENS]
    prompt = choose_format("sentiment", found.kind, found.answers, EVAL_TOKENS)
    prompts = [p.sentiment_prompt(tokenizer, prompt, row.text) for row in rows[:eval_samples]]
    answers = [p.answer_ids(tokenizer, prompt, label) for label in range(len(prompt.answers))]
    text = torch.tensor([ids[:TEXT_TOKENS] for ids in texts[:TEXT_ROWS]])
    return text, (prompts, answers, [row.label for row in rows[:eval_samples]], prompt.answers)


def measure(folder: Path, precision: str, hardware: Hardware, text: torch.Tensor, questions: tuple, reference: list) -> tuple[dict, np.ndarray, list]:
    """(row, nats per token, relative error of each linear layer); fills an empty `reference` with log-probabilities."""
    started = time.perf_counter()
    model = load(folder, precision, hardware)
    text = text.to(hardware.device)
    decode(model, text, 1)  # 16-bit weights are mapped from the file: they are read when they are first multiplied
    load_seconds = time.perf_counter() - started
    source = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True, local_files_only=True)
    parameters, (error, errors) = source.num_parameters(), weight_errors(model, source)
    del source
    layers = [layer for _, layer in linear_layers(model)]
    footprint, linear = held_bytes(model.modules()), held_bytes(layers)
    prefill, nats, kl = read(model, text, reference)
    prompts, answers, truth, names = questions
    report = accuracy_report(score_labels(model, prompts, answers, nullcontext).argmax(1).tolist(), truth, names)
    row = {
        "precision": precision,
        "bits_model": 8 * footprint / parameters,
        "bits_linear": 8 * linear / sum(layer.in_features * layer.out_features for layer in layers),
        "footprint_bytes": footprint,
        "linear_bytes": linear,
        "load_seconds": load_seconds,
        "weight_error": error,
        "kl": kl,
        "perplexity": math.exp(nats.mean()),
        **{key: report[key] for key in ("accuracy", "low", "high")},
        "prefill_tokens_per_second": prefill,
        **dict(zip(("decode_tokens_per_second", "decode_is_steady"), decode(model, text, DECODE_TOKENS))),
    }
    return row, nats, errors


@torch.inference_mode()
def weight_errors(model, source) -> tuple[float, list[dict]]:
    """||W - W^|| / ||W|| against the weights as they are on disk: over all linear layers, and [{layer, module, error}]."""
    exact, errors, lost, total = dict(linear_layers(source)), [], 0.0, 0.0
    for name, layer in linear_layers(model):
        wanted = exact[name].weight.to(layer.weight.device).float()
        difference, norm = (dequantized(layer).float() - wanted).norm().item(), wanted.norm().item()
        number = re.search(r"\.(\d+)\.", name)
        errors.append({"layer": int(number[1]) if number else 0, "module": name.rsplit(".", 1)[-1], "error": difference / norm})
        lost, total = lost + difference**2, total + norm**2
    return math.sqrt(lost / total), errors


@torch.inference_mode()
def read(model, text: torch.Tensor, reference: list) -> tuple[float, np.ndarray, float]:
    """(prefill tokens/s, nats of each token but the rows' first, mean KL in nats from the reference's distributions)."""
    seconds, nats, divergences, is_reference = [], [], [], not reference
    for i, row in enumerate(text):
        synchronize(text.device)
        started = time.perf_counter()
        hidden = hidden_states(model, row[None]).last_hidden_state[0]
        synchronize(text.device)
        seconds.append(time.perf_counter() - started)
        log_p = model.get_output_embeddings()(hidden).float().log_softmax(-1)
        if not log_p.isfinite().all():
            raise UserError("its logits are not finite")
        nats.append(-log_p[:-1].gather(1, row[1:, None])[:, 0].double().cpu().numpy())
        if i < KL_ROWS:
            reference += [log_p] if is_reference else []
            divergences.append(divergence(reference[i], log_p))
    return text.shape[1] / float(np.median(seconds)), np.concatenate(nats), float(np.mean(divergences))


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Mean over positions of KL(p || q) in nats, from log-probabilities (positions, vocabulary)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


class Stopwatch(BaseStreamer):
    """Notes when generate() hands over the prompt, and then each token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode(model, text: torch.Tensor, tokens: int) -> tuple[float | None, bool]:
    """(greedy tokens/s after the first, which pays for the prompt; steady): None if DECODE_SECONDS end before a second one.

    Steady: enough tokens, and half of them within 20% of the median; on a busy machine they are not.
    """
    watch = Stopwatch()
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, max_time=DECODE_SECONDS)
    model.generate(text[:1, :PROMPT_TOKENS], generation_config=config, streamer=watch)
    between = np.diff(watch.times[1:])  # without the prompt's pass
    if not len(between):
        return None, False
    low, middle, high = np.quantile(between, (0.25, 0.5, 0.75))
    return 1 / float(middle), bool(len(between) >= tokens // 2 and high - low <= 0.4 * middle)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(hardware: Hardware) -> None:
    """After the last reference to a model is gone: the next one is loaded into empty memory."""
    gc.collect()
    return_freed_memory()
    if hardware.device == "cuda":
        torch.cuda.empty_cache()


def most_values(folder: Path) -> int:
    """Most different values in any 32 neighbours of the first linear layer; 16 or fewer: it was in 4-bit blocks before (Q4_1, Q4_0)."""
    source = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True, local_files_only=True)
    weight = linear_layers(source)[0][1].weight.detach()
    blocks = weight[:, : weight.shape[1] // 32 * 32].reshape(-1, 32).sort(dim=1).values
    return int((blocks[:, 1:] != blocks[:, :-1]).sum(1).max()) + 1
