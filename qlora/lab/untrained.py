"""LoRA before training: A is random, B is zero: nothing changes. Then noise in B, until the model breaks."""

import math
import statistics
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from qlora.control_tokens import text_ids
from qlora.generation import generate
from qlora.lab.ledger import update_spectrum, variant_of
from qlora.lora import PREFIX, refuse_broken_dora
from qlora.measures import kl_nats, relative_error
from qlora.tables import table_of
from qlora.weights import dequantized

NOISE = (0.001, 0.01, 0.03, 0.1, 0.3)  # |dW|/|W| that B is filled for


@contextmanager
def untrained_lora(model, config: LoraConfig, seed: int):
    """{module name: PEFT's layer} of a fresh adapter inside `model`; on exit the model is what it was."""
    refuse_broken_dora(model, variant_of(config))
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft = get_peft_model(model, config).eval()
    named = peft.named_modules()
    try:
        yield {name.removeprefix(PREFIX): layer for name, layer in named if isinstance(layer, LoraLayer)}
    finally:
        peft.unload()
        for parameter in trainable:  # PEFT froze them
            parameter.requires_grad_(True)


@torch.no_grad()
def show_untrained(base, config: LoraConfig, prompt: str, seed: int, tokens: int = 12) -> dict:
    """Print what a fresh adapter holds and changes (nothing), PEFT's formula, and the drift with noise."""
    model, ids = base.model, text_ids(base.tokenizer, prompt)

    def continuation() -> list[int]:
        return generate(model, [ids], tokens, eos_token_id=base.tokenizer.eos_token_id)[0]

    def noise_row(filled: dict, logits: torch.Tensor, text: list[int]) -> dict:
        words = base.tokenizer.decode(text, skip_special_tokens=True)
        return {**filled, **drift(reference, logits), "text": words}

    # The base's own continuation too: the prompt alone has few positions to compare at.
    own = continuation()
    positions = torch.tensor([ids + own], device=model.device)
    reference = model(input_ids=positions).logits[0]
    with untrained_lora(model, config, seed) as layers:
        fresh = model(input_ids=positions).logits[0]
        result = {"prompt": prompt, "positions": len(fresh), "lora_r": config.r}
        result |= {"variant": variant_of(config), "fresh": fresh_matrices(layers)}
        result["equal"] = torch.equal(fresh, reference)
        result["largest_logit_difference"] = (fresh - reference).abs().max().item()
        show_fresh(result)
        fill_b(layers, 0.1, seed)
        result["formula"] = check_formula(*next(iter(layers.items())), model.dtype, seed)
        show_formula(result["formula"])
        result["noise"] = [noise_row({"ratio": 0.0, "std_b": 0.0}, fresh, own)]
        for target in NOISE:
            filled = fill_b(layers, target, seed)
            result["noise"].append(noise_row(filled, model(input_ids=positions).logits[0], continuation()))
    show_noise(result)
    return result


def fresh_matrices(layers: dict) -> list[dict]:
    """A and B by number of inputs. A is uniform in ±1/sqrt(in) (Kaiming, a = sqrt(5)): std 1/sqrt(3 in)."""
    groups: dict[int, list] = {}
    for layer in layers.values():
        pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        groups.setdefault(layer.in_features, []).append(pair)
    rows = []
    for inner, pairs in groups.items():
        a, b = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
        row = {"in": inner, "matrices": len(pairs)}
        row |= {"std_a": a.std().item(), "std_by_formula": 1 / math.sqrt(3 * inner)}
        row |= {"largest_a": a.abs().max().item(), "bound_by_formula": 1 / math.sqrt(inner)}
        row["a_fits_bf16"] = torch.equal(a, a.bfloat16().to(a.dtype))
        row["largest_b"] = b.abs().max().item()
        row["largest_ba"] = max((y @ x).abs().max().item() for x, y in pairs)
        rows.append(row)
    return rows


def fill_b(layers: dict, ratio: float, seed: int) -> dict:
    """Gaussian noise into every B, so that |dW|/|W| = `ratio`; returns the medians of ratio and std of B."""
    generator = torch.Generator().manual_seed(seed)
    ratios, deviations = [], []
    for layer in layers.values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scaling = layer.scaling["default"]
        size = torch.linalg.vector_norm(dequantized(layer.get_base_layer()), dtype=torch.float32)
        b.copy_(torch.randn(b.shape, generator=generator))
        b.mul_(ratio * size / update_spectrum(a, b, scaling).norm())
        ratios.append((update_spectrum(a, b, scaling).norm() / size).item())
        deviations.append(b.std().item())
    return {"ratio": statistics.median(ratios), "std_b": statistics.median(deviations)}


def check_formula(name: str, layer, dtype: torch.dtype, seed: int) -> dict:
    """PEFT's output of one layer against W x + c B A x, for the scalings c in circulation."""
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    r, alpha = layer.r["default"], layer.lora_alpha["default"]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, layer.in_features, generator=generator).to(a.device, dtype)
    output, frozen, low = layer(x).float(), layer.get_base_layer()(x).float(), x.float() @ a.T @ b.T
    rows = []
    for rule, c in (("alpha/r", alpha / r), ("alpha/sqrt(r)", alpha / math.sqrt(r)), ("alpha", float(alpha))):
        product = frozen + c * low
        errors = {"largest_difference": (output - product).abs().max().item()}
        rows.append({"rule": rule, "scaling": c, **errors, "relative": relative_error(output, product)})
    shapes = {"w": [layer.out_features, layer.in_features], "a": list(a.shape), "b": list(b.shape)}
    return {"layer": name, **shapes, "rules": rows}


def drift(base: torch.Tensor, other: torch.Tensor) -> dict:
    """KL(base || other) in nats and agreement of the likeliest token, over logits (positions, vocabulary)."""
    p, q = (logits.float().log_softmax(-1) for logits in (base, other))
    return {"kl_nats": kl_nats(p, q), "top1_agreement": (p.argmax(-1) == q.argmax(-1)).float().mean().item()}


def show_fresh(result: dict) -> None:
    matrices = sum(row["matrices"] for row in result["fresh"])
    print(f"untrained {result['variant']}, r {result['lora_r']}, on {matrices} matrices")
    columns = {"in": "{in}", "matrices": "{matrices}", "std of A": "{std_a:.5f}"}
    columns |= {"1/sqrt(3 in)": "{std_by_formula:.5f}", "max |A|": "{largest_a:.5f}"}
    columns |= {"1/sqrt(in)": "{bound_by_formula:.5f}"}
    columns |= {"max |B|": "{largest_b:g}", "max |BA|": "{largest_ba:g}"}
    print(table_of(result["fresh"], columns))
    if any(row["largest_a"] > row["bound_by_formula"] and row["a_fits_bf16"] for row in result["fresh"]):
        print("  The largest can pass the bound: PEFT rounds A to the base's bf16 before it makes it fp32.")
    off = f"off by up to {result['largest_logit_difference']:.3g}"
    verdict = "the base's, bit for bit" if result["equal"] else off
    rescaled = "; DoRA divides by |W| and multiplies by it again" if result["variant"] == "dora" else ""
    print(f"  logits at {result['positions']} positions with this adapter: {verdict}{rescaled}")


def show_formula(check: dict) -> None:
    (out, inner), (r, _) = check["w"], check["a"]
    columns = {"formula": "W x + {rule} B A x", "scaling": "{scaling:.2f}"}
    columns |= {"largest difference": "{largest_difference:.4f}", "relative error": "{relative:.2%}"}
    shapes = f"W {out} x {inner}, A {r} x {inner}, B {out} x {r}"
    print(f"what PEFT computes in {check['layer']}: {shapes} (noise in B)")
    print(table_of(check["rules"], columns))
    square = f"A B is {r} x {r} and can't take an x of {inner}"
    wrong = square if out == inner else f"{r} x {inner} times {out} x {r} can't be multiplied"
    print(f"  W x + alpha (A B) x, as it is often written: {wrong}")


def show_noise(result: dict) -> None:
    columns = {"|dW|/|W|": "{ratio:8.2%}", "std of B": "{std_b:8.2g}", "KL (nats)": "{kl_nats:9.4f}"}
    columns |= {"same top token": "{top1_agreement:14.0%}", "continuation": "{text:.70}"}
    rows = [{**row, "text": " ".join(row["text"].split())} for row in result["noise"]]
    where = f"{result['positions']} positions"
    print(f"B filled with Gaussian noise: drift from the base at {where}, and greedy text")
    print(table_of(rows, columns, left=len(columns)))
    broken = [row["ratio"] for row in rows if row["top1_agreement"] < 0.5]
    where = f"from {100 * broken[0]:.2g}% on" if broken else "nowhere here"
    print(f"  the likeliest token is another one at more than half of the positions {where}")
