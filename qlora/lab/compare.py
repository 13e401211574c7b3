"""Precisions side by side: the same text through the same model, loaded in one precision after the other."""

import gc
import math
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from config import COMPARABLE
from qlora import prompts as p
from qlora.calibrated import calibration_ids, calibration_notes
from qlora.cli import UserError, first_line, note, progress
from qlora.data import load_rows, split
from qlora.evaluation import accuracy_report, score_labels
from qlora.generation import generate
from qlora.hardware import Hardware, detect, return_freed_memory
from qlora.lab.compare_pictures import FOUR_BIT, findings, show_header, show_rows
from qlora.lab.precisions import CALIBRATED, default_precisions, emulated, load, load_source, prepare
from qlora.logits import hidden_states, logits_from
from qlora.measures import kl_nats, most_values_in_32, relative_error
from qlora.packed import METHODS as PACKED
from qlora.weights import dequantized, held_bytes, linear_layers

TEXT_ROWS, TEXT_TOKENS = 4, 256  # of held-out reviews: perplexity and prefill
KL_ROWS = 2  # of these, whose reference distributions are kept: 512 x 49152 numbers in fp32 are 0.1 GB
EVAL_TOKENS = 96  # per review, question included
PROMPT_TOKENS, DECODE_TOKENS, DECODE_SECONDS = 16, 16, 6.0  # decoding stops at what comes first


@dataclass
class HeldOut:
    """What every precision reads: reviews (rows, tokens), and the zero-shot question about others."""

    text: torch.Tensor
    prompts: list[list[int]]
    answers: list[list[int]]
    truth: list[int]
    names: tuple[str, ...]
    # Log-probabilities (tokens, vocabulary) of the first KL_ROWS reviews by the first precision measured.
    reference: list[torch.Tensor] = field(default_factory=list)


def compare(
    name: str,
    precisions: Sequence[str] | None,
    eval_samples: int,
    seed: int,
    device="auto",
    calibration=(32, 256, 64),
) -> dict:
    """Print a row per precision (some of COMPARABLE; default: what this device runs well) and what they say.

    `calibration`: rows of training data and tokens of each, which gptq, awq and int8-static look at, and how
    many inputs share a scale in gptq and awq.
    Returns {reference, text, rows, errors, findings}: rows hold figures or a `reason`; errors the relative
    error of each linear layer in 4-bit rows. Raises UserError where no precision could be measured.
    """
    hardware = detect(device=device)
    source = load_source(name, hardware)
    held = held_out(source.tokenizer, eval_samples, seed)
    chosen = precisions or default_precisions(hardware)
    ordered = [p for p in COMPARABLE if p in chosen]  # highest first: it becomes the reference
    *count_and_length, group = calibration
    ids = None
    if CALIBRATED & set(ordered):
        ids = calibration_ids(source.tokenizer, *count_and_length, eval_samples, seed)
    announce(ordered, hardware)
    sizes = {"rows": len(held.text), "tokens_per_row": held.text.shape[1]}
    sizes |= {"kl_positions": held.text[:KL_ROWS].numel(), "eval_rows": eval_samples}
    sizes |= {"eval_tokens": EVAL_TOKENS, "decode_tokens": DECODE_TOKENS, "seed": seed}
    result: dict = {"reference": None, "text": sizes, "rows": [], "errors": {}}
    nats = {}
    show_header(f"{name} on {hardware.name}", sizes)
    try:
        with progress(len(ordered), "compare") as step:
            for precision in ordered:
                try:
                    row, nats[precision], errors = measure(
                        name, precision, hardware, held, source.model, (ids, group)
                    )
                    result["reference"] = result["reference"] or precision
                    result["errors"] |= {precision: errors} if precision in FOUR_BIT else {}
                except Exception as error:  # a library's refusal is the row's result
                    row = {"precision": precision, "reason": first_line(error)}
                    if result["reference"] is None:
                        held.reference.clear()
                result["rows"].append(row)
                release(hardware)
                step(1)
    finally:  # after Ctrl-C, too: a row can take minutes
        show_rows(result["rows"], result["reference"])
    measured = {row["precision"]: row for row in result["rows"] if "reason" not in row}
    if not measured:
        raise UserError(f"{name}: no precision could be measured ({result['rows'][0]['reason']})")
    values = most_values_in_32(linear_layers(source.model)[0][1].weight.detach())
    result["findings"] = findings(measured, nats, values)
    return result


def announce(ordered: list[str], hardware: Hardware) -> None:
    for precision in ordered:
        if emulated(precision, hardware):
            note(f"note       this device has no arithmetic in {precision}: each product converts it first")
    if others := [p for p in COMPARABLE if p not in ordered]:
        note(f"note       not measured: {', '.join(others)} (give --compare their names)")


def held_out(tokenizer, eval_samples: int, seed: int) -> HeldOut:
    """IMDB reviews that training holds out as well, in the same order."""
    found = load_rows("imdb")
    rows = split(found, 0, max(eval_samples, 64), seed)[1]
    texts = [ids for row in rows if len(ids := p.text_ids(tokenizer, row.text)) >= TEXT_TOKENS]
    prompt = p.choose_format("sentiment", found.kind, found.answers, EVAL_TOKENS)
    asked = rows[:eval_samples]
    return HeldOut(
        text=torch.tensor([ids[:TEXT_TOKENS] for ids in texts[:TEXT_ROWS]]),
        prompts=[p.sentiment_prompt(tokenizer, prompt, row.text) for row in asked],
        answers=[p.answer_ids(tokenizer, prompt, label) for label in range(len(prompt.answers))],
        truth=[row.label for row in asked],
        names=prompt.answers,
    )


def measure(name: str, precision: str, hardware: Hardware, held: HeldOut, source, calibration) -> tuple:
    """(row, nats per token, relative error of each linear layer); fills an empty `held.reference`."""
    ids, group = calibration
    name = prepare(name, precision, hardware, ids, group)
    started = time.perf_counter()
    model = load(name, precision, hardware, ids)
    made = calibration_notes(model) if precision in PACKED else {}
    text = held.text.to(hardware.device)
    decode(model, text, 1)  # 16-bit weights are mapped from the file: they are read when first multiplied
    load_seconds = time.perf_counter() - started
    error, errors = weight_errors(model, source, made.get("errors"))
    layers = [layer for _, layer in linear_layers(model)]
    footprint, linear = held_bytes(model.modules()), held_bytes(layers)
    prefill, nats, kl = read(model, text, held.reference)
    predicted = score_labels(model, held.prompts, held.answers, nullcontext).argmax(1).tolist()
    report = accuracy_report(predicted, held.truth, held.names)
    speed, steady = decode(model, text, DECODE_TOKENS)
    row = {
        "precision": precision,
        "bits_model": 8 * footprint / source.num_parameters(),
        "bits_linear": 8 * linear / sum(layer.in_features * layer.out_features for layer in layers),
        "footprint_bytes": footprint,
        "linear_bytes": linear,
        "load_seconds": load_seconds,
        **({"calibration_seconds": made["seconds"]} if made else {}),
        "weight_error": error,
        "kl": kl,
        "perplexity": math.exp(nats.mean()),
        **{key: report[key] for key in ("accuracy", "low", "high")},
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": speed,
        "decode_is_steady": steady,
    }
    return row, nats, errors


@torch.inference_mode()
def weight_errors(model, source, known: dict[str, float] | None = None) -> tuple[float, list[dict]]:
    """|W - W'| / |W| against the weights on disk: over all linear layers, and [{layer, module, error}].

    `known`: each layer's, where its weights can't be compared (AWQ's are stretched).
    """
    exact, errors, lost, total = dict(linear_layers(source)), [], 0.0, 0.0
    for name, layer in linear_layers(model):
        wanted = exact[name].weight.to(layer.weight.device).float()
        error = known[name] if known else relative_error(wanted, dequantized(layer).float())
        size = wanted.norm().item()
        number = re.search(r"\.(\d+)\.", name)
        place = {"layer": int(number[1]) if number else 0, "module": name.rsplit(".", 1)[-1]}
        errors.append({**place, "error": error})
        lost, total = lost + (error * size) ** 2, total + size**2
    return math.sqrt(lost / total), errors


@torch.inference_mode()
def read(model, text: torch.Tensor, reference: list) -> tuple[float, np.ndarray, float]:
    """(prefill tokens/s, nats of each token but the rows' first, mean KL in nats from the reference)."""
    wait = torch.cuda.synchronize if text.is_cuda else lambda: None
    seconds, nats, divergences, is_reference = [], [], [], not reference
    for i, row in enumerate(text):
        wait()
        started = time.perf_counter()
        hidden = hidden_states(model, row[None]).last_hidden_state[0]
        wait()
        seconds.append(time.perf_counter() - started)
        log_p = logits_from(model, hidden).log_softmax(-1)
        if not log_p.isfinite().all():
            raise UserError("its logits are not finite")
        nats.append(-log_p[:-1].gather(1, row[1:, None])[:, 0].double().cpu().numpy())
        if i < KL_ROWS:
            reference += [log_p] if is_reference else []
            divergences.append(kl_nats(reference[i], log_p))
    return text.shape[1] / float(np.median(seconds)), np.concatenate(nats), float(np.mean(divergences))


class Stopwatch(list):
    """The times at which generate() hands over the prompt, and then each token."""

    def put(self, value) -> None:
        self.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode(model, text: torch.Tensor, tokens: int) -> tuple[float | None, bool]:
    """(greedy tokens/s after the first, which pays for the prompt; steady).

    None if DECODE_SECONDS end before a second token. Steady: enough tokens, half of them within 20% of the
    median. On a busy machine they are not.
    """
    watch, prompt = Stopwatch(), text[0, :PROMPT_TOKENS].tolist()
    generate(model, [prompt], tokens, streamer=watch, max_time=DECODE_SECONDS)
    between = np.diff(watch[1:])  # without the prompt's pass
    if not len(between):
        return None, False
    low, middle, high = np.quantile(between, (0.25, 0.5, 0.75))
    return 1 / float(middle), bool(len(between) >= tokens // 2 and high - low <= 0.4 * middle)


def release(hardware: Hardware) -> None:
    """After the last reference to a model is gone: the next one is loaded into empty memory."""
    gc.collect()
    return_freed_memory()
    if hardware.device == "cuda":
        torch.cuda.empty_cache()
