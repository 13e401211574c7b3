"""LoRA before training: A is random, B is zero, so nothing changes; then B filled with noise, to see when the model breaks."""

from __future__ import annotations

import math
import statistics
from contextlib import contextmanager

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from qlora.ledger import PREFIX, lora_config, update_spectrum
from qlora.lora import refuse_broken_dora
from qlora.sampling import GREEDY, continue_text
from qlora.weights import dequantized

NOISE = (0.001, 0.01, 0.03, 0.1, 0.3)  # |dW|/|W| that B is filled for


@contextmanager
def untrained_lora(model, config, seed: int):
    """{module name: PEFT's layer} of a fresh adapter inside `model`; on exit the model is what it was."""
    refuse_broken_dora(model, "dora" if config.use_dora else "lora")
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft = get_peft_model(model, config).eval()
    try:
        yield {name.removeprefix(PREFIX): layer for name, layer in peft.named_modules() if isinstance(layer, LoraLayer)}
    finally:
        peft.unload()
        for parameter in trainable:  # PEFT froze them
            parameter.requires_grad_(True)


@torch.no_grad()
def show_untrained(model, tokenizer, prompt: str, seed: int, lora_r: int = 16, lora_alpha: int | None = None,
                   target_modules: str = "all-linear", lora_variant: str = "lora", tokens: int = 12) -> dict:
    """Print what a fresh adapter holds and that it changes nothing, PEFT's formula on one layer, and the drift with noise in B."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)[0]
    continuation = continue_text(model, ids, [GREEDY], tokens, seed)[0]
    # The base's own continuation too: the prompt alone has few positions to compare at.
    positions = torch.cat([ids, torch.tensor(continuation, dtype=ids.dtype, device=ids.device)])[None]
    base = model(input_ids=positions).logits[0]
    with untrained_lora(model, lora_config(model, lora_r, lora_alpha, target_modules, lora_variant), seed) as layers:
        fresh = model(input_ids=positions).logits[0]
        result = {"prompt": prompt, "positions": len(base), "lora_r": lora_r, "variant": lora_variant, "fresh": fresh_matrices(layers),
                  "equal": torch.equal(fresh, base), "largest_logit_difference": (fresh - base).abs().max().item()}
        _show_fresh(result)
        fill_b(layers, 0.1, seed)
        result["formula"] = check_formula(*next(iter(layers.items())), model.dtype, seed)
        _show_formula(result["formula"])
        result["noise"] = [{"ratio": 0.0, "std_b": 0.0, **drift(base, fresh), "text": tokenizer.decode(continuation)}]
        _show_noise(result)
        for target in NOISE:
            filled = fill_b(layers, target, seed)
            row = drift(base, model(input_ids=positions).logits[0])
            text = continue_text(model, ids, [GREEDY], tokens, seed)[0]
            result["noise"].append({**filled, **row, "text": tokenizer.decode(text)})
            _show_noise_row(result["noise"][-1])
    broken = [row["ratio"] for row in result["noise"] if row["top1_agreement"] < 0.5]
    print(f"  the likeliest token is another one at more than half of the positions {f'from {100 * broken[0]:.2g}% on' if broken else 'nowhere here'}")
    return result


def fresh_matrices(layers: dict) -> list[dict]:
    """A and B by the number of inputs: A is uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5)), so its std is 1/sqrt(3 in)."""
    groups: dict[int, list] = {}
    for layer in layers.values():
        groups.setdefault(layer.in_features, []).append((layer.lora_A["default"].weight, layer.lora_B["default"].weight))
    rows = []
    for inner, pairs in groups.items():
        a, b = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
        rows.append({
            "in": inner, "matrices": len(pairs), "std_a": a.std().item(), "std_by_formula": 1 / math.sqrt(3 * inner),
            "largest_a": a.abs().max().item(), "bound_by_formula": 1 / math.sqrt(inner), "a_fits_bf16": torch.equal(a, a.bfloat16().to(a.dtype)),
            "largest_b": b.abs().max().item(), "largest_ba": max((y @ x).abs().max().item() for x, y in pairs),
        })
    return rows


def fill_b(layers: dict, ratio: float, seed: int) -> dict:
    """Gaussian noise into every B, of the size that makes |dW|/|W| = `ratio`; returns ratio and std of B as measured (medians)."""
    generator = torch.Generator().manual_seed(seed)
    ratios, deviations = [], []
    for layer in layers.values():
        a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        size = torch.linalg.vector_norm(dequantized(layer.get_base_layer()), dtype=torch.float32)
        b.copy_(torch.randn(b.shape, generator=generator))
        b.mul_(ratio * size / update_spectrum(a, b, scaling).norm())
        ratios.append((update_spectrum(a, b, scaling).norm() / size).item())
        deviations.append(b.std().item())
    return {"ratio": statistics.median(ratios), "std_b": statistics.median(deviations)}


def check_formula(name: str, layer, dtype: torch.dtype, seed: int) -> dict:
    """PEFT's output of one layer against W x + c B A x for the scalings c in circulation; errors relative to |output|."""
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    r, alpha = layer.r["default"], layer.lora_alpha["default"]
    x = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(seed)).to(a.device, dtype)
    output, frozen, low = layer(x).float(), layer.get_base_layer()(x).float(), x.float() @ a.T @ b.T
    rows = []
    for rule, c in (("alpha/r", alpha / r), ("alpha/sqrt(r)", alpha / math.sqrt(r)), ("alpha", float(alpha))):
        error = output - (frozen + c * low)
        rows.append({"rule": rule, "scaling": c, "largest_difference": error.abs().max().item(), "relative": (error.norm() / output.norm()).item()})
    return {"layer": name, "w": [layer.out_features, layer.in_features], "a": list(a.shape), "b": list(b.shape), "rules": rows}


def drift(base: torch.Tensor, other: torch.Tensor) -> dict:
    """KL(base || other) in nats and agreement of the likeliest token, over logits (positions, vocabulary)."""
    p, q = (logits.float().log_softmax(-1) for logits in (base, other))
    return {"kl_nats": (p.exp() * (p - q)).sum(-1).mean().item(), "top1_agreement": (p.argmax(-1) == q.argmax(-1)).float().mean().item()}


def _show_fresh(result: dict) -> None:
    print(f"untrained {result['variant']}, r {result['lora_r']}, on {sum(row['matrices'] for row in result['fresh'])} matrices")
    print(f"  {'in':>6} {'matrices':>8}   {'std of A':>8} {'1/sqrt(3 in)':>12}   {'max |A|':>8} {'1/sqrt(in)':>10}   {'max |B|':>8} {'max |BA|':>8}")
    for row in result["fresh"]:
        print(f"  {row['in']:6} {row['matrices']:8}   {row['std_a']:8.5f} {row['std_by_formula']:12.5f}   {row['largest_a']:8.5f} "
              f"{row['bound_by_formula']:10.5f}   {row['largest_b']:8g} {row['largest_ba']:8g}")
    if any(row["largest_a"] > row["bound_by_formula"] and row["a_fits_bf16"] for row in result["fresh"]):
        print("  every A is rounded to bf16 (PEFT gives it the base's dtype before it makes it fp32), so the largest can lie above the bound")
    verdict = "the base's, bit for bit" if result["equal"] else f"off by up to {result['largest_logit_difference']:.3g}"
    rescaled = "; DoRA divides by |W| and multiplies by it again" if result["variant"] == "dora" else ""
    print(f"  logits at {result['positions']} positions with this adapter: {verdict}{rescaled}")


def _show_formula(check: dict) -> None:
    (out, inner), (r, _) = check["w"], check["a"]
    print(f"what PEFT computes in {check['layer']}: W {out} x {inner}, A {r} x {inner}, B {out} x {r} (noise in B for this check)")
    for row in check["rules"]:
        formula = f"W x + {row['rule']} B A x"
        print(f"  {formula:27} scaling {row['scaling']:6.2f}   largest difference {row['largest_difference']:9.4f}   "
              f"relative error {100 * row['relative']:8.2f}%")
    product = f"is {r} x {r} and can't take an x of {inner}" if out == inner else f"has no meaning: {r} x {inner} times {out} x {r}"
    print(f"  {'W x + alpha (A B) x':27} A B {product}")


def _show_noise(result: dict) -> None:
    print(f"B filled with Gaussian noise; KL to the base and agreement over {result['positions']} positions, and what follows the prompt greedily")
    print(f"  {'|dW|/|W|':>8} {'std of B':>9} {'KL (nats)':>9} {'same top token':>14}   continuation")
    _show_noise_row(result["noise"][0])


def _show_noise_row(row: dict) -> None:
    text = " ".join(row["text"].split())[:84]
    print(f"  {100 * row['ratio']:7.2f}% {row['std_b']:9.2g} {row['kl_nats']:9.4f} {100 * row['top1_agreement']:13.0f}%   {text}")
