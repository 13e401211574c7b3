"""What temperature, top-k and top-p do to the next token's distribution, and to the text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Sequence

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qlora.pictures import COLOURS, new_axes, save

TEMPERATURES, TOP_KS, TOP_PS = (0.5, 0.7, 1.0, 1.5), (0, 50, 5), (1.0, 0.9)
GREEDY: dict = {}  # a choice without settings: the likeliest token
SAMPLES = (
    GREEDY, {"temperature": 0.7}, {"temperature": 1.0}, {"temperature": 1.5},
    {"temperature": 1.5, "top_p": 0.9}, {"temperature": 1.5, "top_k": 50}, {"temperature": 1.5, "top_k": 5},
)


def next_distribution(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Probabilities (vocabulary,) after temperature, then top-k, then top-p, as `generate` applies them; top_k 0: all tokens.

    next_distribution(log [0.5, 0.3, 0.2], top_p=0.7) -> [0.625, 0.375, 0]: the fewest tokens that reach 0.7 together.
    """
    p = (logits.double() / temperature).softmax(-1)
    if top_k:  # equal logits at the border stay together: bf16 has few different values, so they happen
        p = p.where(p >= p.topk(min(top_k, len(p))).values[-1], 0)
        p = p / p.sum()
    if top_p < 1:
        rising, order = p.sort()  # cut from below, so that what goes is less than 1 - top_p
        dropped = rising.cumsum(-1) <= 1 - top_p
        dropped[-1] = False
        p = p.index_fill(-1, order[dropped], 0)
        p = p / p.sum()
    return p


def by_transformers(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """The same by the warpers that `generate` uses."""
    warpers = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = logits.double()[None]
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0].softmax(-1)


def entropy_bits(p: torch.Tensor) -> float:
    """[0.5, 0.25, 0.25] -> 1.5"""
    return torch.special.entr(p).sum().item() / math.log(2)


@torch.inference_mode()
def continue_text(model, ids: torch.Tensor, choices: Sequence[dict], tokens: int, seed: int, end_id: int | None = None) -> list[list[int]]:
    """One continuation of `ids` (tokens,) per choice, up to `end_id`; all in one batch, each drawing from its own generator."""
    generators = [torch.Generator().manual_seed(seed) for _ in choices]
    step, cache, drawn = ids.repeat(len(choices), 1), None, []
    for _ in range(tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, rows = output.past_key_values, output.logits[:, -1].cpu()
        drawn.append([
            int(row.argmax() if choice == GREEDY else torch.multinomial(next_distribution(row, **choice), 1, generator=generator))
            for row, choice, generator in zip(rows, choices, generators)
        ])
        step = torch.tensor(drawn[-1], device=ids.device)[:, None]
    return [list(row[: row.index(end_id)] if end_id in row else row) for row in zip(*drawn)]


def show_sampling(model, tokenizer, prompt: str, seed: int, tokens: int = 12) -> dict:
    """Print the distribution after `prompt` for a grid of settings, then seeded samples; the model is only read."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, -1].float().cpu()
    best = logits.double().softmax(-1).topk(12)
    result = {
        "prompt": prompt, "vocabulary": len(logits), "tokens": [repr(tokenizer.decode([i])) for i in best.indices.tolist()],
        "distributions": _grid(logits, best.indices), **_samples(model, tokenizer, ids[0], tokens, seed),
    }
    _show_grid(result)
    _show_samples(result)
    return result


def _grid(logits: torch.Tensor, best: torch.Tensor) -> list[dict]:
    rows = []
    for temperature in TEMPERATURES:
        for top_k in TOP_KS:
            for top_p in TOP_PS:
                setting = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
                p = next_distribution(logits, **setting)
                rows.append({**setting, "entropy_bits": entropy_bits(p), "survivors": int((p > 0).sum()), "probabilities": p[best].tolist(),
                             "off_transformers": (p - by_transformers(logits, **setting)).abs().max().item()})
    return rows


def _samples(model, tokenizer, ids: torch.Tensor, tokens: int, seed: int) -> dict:
    """Texts by seed, by seed again, and by another seed."""
    first, again, other = (continue_text(model, ids, SAMPLES, tokens, s, tokenizer.eos_token_id) for s in (seed, seed, seed + 1))
    return {"seed": seed, "samples": [
        {"setting": setting, "text": tokenizer.decode(a), "repeats": a == b, "same_with_other_seed": a == c}
        for setting, a, b, c in zip(SAMPLES, first, again, other)
    ]}


def _show_grid(result: dict) -> None:
    shown = 5
    print(f"next token after {result['prompt']!r}, of {result['vocabulary']:,}")
    print(f"  {'temperature':>11} {'top-k':>5} {'top-p':>5}   {'entropy':>9}   {'survive':>7}   " + " ".join(f"{t:>12}" for t in result["tokens"][:shown]))
    for row in result["distributions"]:
        print(f"  {row['temperature']:11} {row['top_k'] or 'all':>5} {row['top_p']:5}   {row['entropy_bits']:4.2f} bits   {row['survivors']:7,}   "
              + " ".join(f"{100 * p:11.2f}%" for p in row["probabilities"][:shown]))
    off = max(row["off_transformers"] for row in result["distributions"])
    print(f"  largest difference from transformers' own warpers, over all {len(result['distributions'])} settings: {off:.1g}")
    ties = [row for row in result["distributions"] if row["top_k"] and row["survivors"] > row["top_k"]]
    if ties:
        print(f"  top-k {ties[0]['top_k']} kept {ties[0]['survivors']} tokens: logits that equal the last one's all stay, here as in transformers")


def _show_samples(result: dict) -> None:
    samples, seed = result["samples"], result["seed"]
    print(f"samples with seed {seed}")
    for sample in samples:
        print(f"  {_name(sample['setting']):27} {' '.join(sample['text'].split())}")
    unsteady = [_name(s["setting"]) for s in samples if not s["repeats"]]
    steady = [_name(s["setting"]) for s in samples if s["same_with_other_seed"]]
    print(f"  drawn again with seed {seed}: " + (f"NOT the same: {'; '.join(unsteady)}" if unsteady else f"all {len(samples)} the same")
          + f"; with seed {seed + 1}: {len(steady)} the same ({'; '.join(steady) or 'none'})")


def _name(setting: dict) -> str:
    return ", ".join(f"{key.replace('_', '-')} {value}" for key, value in setting.items()) or "greedy"


def draw_distribution(path: Path, result: dict) -> None:
    """The likeliest tokens' probabilities at each temperature, without top-k and top-p."""
    figure, axes = new_axes(8, 4.5)
    rows = [row for row in result["distributions"] if row["top_k"] == 0 and row["top_p"] == 1]
    for row, colour, marker, line in zip(rows, COLOURS, "osD^", ("-", "--", "-.", ":")):
        label = f"temperature {row['temperature']}: entropy {row['entropy_bits']:.1f} bits"
        axes.plot([100 * p for p in row["probabilities"]], color=colour, marker=marker, linestyle=line, label=label)
    axes.set_xticks(range(len(result["tokens"])), result["tokens"], rotation=35, ha="right")
    axes.set(yscale="log", ylabel="probability of the next token (%)", xlabel="token, likeliest first", title=f"after: {result['prompt'][-70:]}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    save(figure, path)
