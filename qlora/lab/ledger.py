"""What LoRA adds, by module type, from a config alone; and how large a trained adapter's updates became."""

import statistics
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig

from config import LORA_VARIANTS, NAMED_ADAPTERS
from qlora.adapters import WEIGHTS, read_adapter
from qlora.cli import UserError, first_line
from qlora.lora import PREFIX, lora_config, resolve_targets
from qlora.shapes import SHAPES, skeleton
from qlora.tables import table, table_of
from qlora.weights import dequantized

# Modules, rank and parameters that courses and posts give for Llama 3.2 3B. show_other_models counts them.
OFTEN_TOLD = ("q_proj,v_proj", 16, 8_388_608)
ADAPTER_BYTES = 4  # adapters are trained and saved in fp32


def ledger(config, settings) -> dict:
    """Rows per module type of a transformers `config`, their sum by r (in + out), and PEFT's own count.

    `settings` hold lora_r, lora_alpha, lora_dropout, target_modules and lora_variant.
    """
    frame = skeleton(config)
    return count(frame, lora_config(frame, settings))[0]


def variant_of(config: LoraConfig) -> str:
    """The name in LORA_VARIANTS of what a LoraConfig says of an adapter's shape and scale."""
    named = [(name, v.options.items()) for name, v in LORA_VARIANTS.items() if v.options]
    return next((name for name, options in named if options <= vars(config).items()), "lora")


def count(frame, config: LoraConfig) -> tuple[dict, dict]:
    """(ledger, {module name: PEFT's layer}) of LoRA put into `frame`, a skeleton that is used up by it."""
    with torch.device("meta"):
        peft = get_peft_model(frame, config)
    named = peft.named_modules()
    layers = {name.removeprefix(PREFIX): layer for name, layer in named if isinstance(layer, LoraLayer)}
    rows: dict[tuple, dict] = {}
    for name, layer in layers.items():
        r, (out, inner) = layer.r["default"], layer.get_base_layer().weight.shape
        module = name.rsplit(".", 1)[-1]
        shapes = {"w": [out, inner], "a": [r, inner], "b": [out, r]}
        rows.setdefault((module, out, inner, r), {"module": module, "layers": 0, **shapes})["layers"] += 1
    for (_, out, inner, r), row in rows.items():
        each = r * (inner + out) + (out if config.use_dora else 0)  # DoRA: one magnitude per row of W
        row |= {"parameters": row["layers"] * each, "bytes": ADAPTER_BYTES * row["layers"] * each}
        row["share_of_w"] = each / (out * inner)
    parameters = sum(row["parameters"] for row in rows.values())
    for row in rows.values():
        row["share_of_lora"] = row["parameters"] / parameters
    trainable, total = peft.get_nb_trainable_parameters()
    return {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "variant": variant_of(config),
        "scalings": sorted({layer.scaling["default"] for layer in layers.values()}),
        "rows": list(rows.values()),
        "parameters": parameters,
        "bytes": ADAPTER_BYTES * parameters,
        "peft_trainable": trainable,
        "peft_total": total,
        "percent": 100 * trainable / total,
    }, layers


def show_ledger(result: dict, name: str) -> None:
    """Print the result of `ledger`; `name` is the model's."""
    scaling = ", ".join(f"{s:.4g}" for s in result["scalings"])
    rule = "alpha/sqrt(r)" if result["variant"] == "rslora" else "alpha/r"
    magnitudes = ", one magnitude per row of W included" if result["variant"] == "dora" else ""
    what = f"{result['variant']} on {name}{magnitudes}"
    print(f"{what}: r {result['lora_r']}, alpha {result['lora_alpha']}, dW = {scaling} B A ({rule})")
    columns = {"module": "{module}", "layers": "{layers}", "W (out x in)": "{w[0]} x {w[1]}"}
    columns |= {"A (r x in)": "{a[0]} x {a[1]}", "B (out x r)": "{b[0]} x {b[1]}"}
    columns |= {"parameters": "{parameters:,}", "MB (fp32)": "{megabytes:.2f}"}
    columns |= {"of LoRA": "{share_of_lora:.1%}", "of its W": "{share_of_w:.2%}"}
    print(table_of([{**row, "megabytes": row["bytes"] / 1e6} for row in result["rows"]], columns))
    layers, parameters = sum(row["layers"] for row in result["rows"]), result["parameters"]
    trainable, total, percent = result["peft_trainable"], result["peft_total"], result["percent"]
    same = "the same" if trainable == parameters else f"{trainable - parameters:+,} against the sum"
    print(f"  sum: {layers} matrices, {parameters:,} parameters, {result['bytes'] / 1e6:.2f} MB")
    print(f"  PEFT's own count: {trainable:,} trainable of {total:,} ({percent:.2f}%): {same}")


def show_other_models() -> dict:
    """Print three adapters' sizes on every Llama preset, from configs alone, by the sum of r (in + out)."""
    # Without arguments transformers' Llama is Llama 2 7B, whose counts are often quoted for its successors.
    models = {"llama-2-7b": {"model_type": "llama"}} | {n: SHAPES[n] for n in SHAPES if n.startswith("llama")}
    cases = {f"{targets} r {r}": (targets, r) for targets, r in (OFTEN_TOLD[:2], *NAMED_ADAPTERS.values())}
    counts, rows = {}, []
    for name, shapes in models.items():
        frame = skeleton(AutoConfig.for_model(**shapes))
        base = frame.num_parameters()
        added = {case: lora_parameters(frame, r, targets) for case, (targets, r) in cases.items()}
        counts[name] = {"parameters": base, **added}
        cells = (f"{n:,} {n / (base + n):7.2%} {ADAPTER_BYTES * n / 1e6:6.1f} MB" for n in added.values())
        rows.append((name, f"{base:,}", *cells))
    print("LoRA parameters of other models: sum of r (in + out); share of base + LoRA; MB in fp32")
    print(table(["model", "base", *cases], rows))
    column, told = next(iter(cases)), OFTEN_TOLD[2]
    owners = ", ".join(name for name, row in counts.items() if row[column] == told) or "no model here"
    counted = counts["llama-3.2-3b"][column]
    print(f"  often told of llama-3.2-3b, {column}: {told:,}; counted here: {counted:,}.")
    print(f"  {told:,} is the count of {owners}.")
    return counts


def lora_parameters(model, lora_r: int, targets: str) -> int:
    names = resolve_targets(model, targets)
    modules = (m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in names)
    return sum(lora_r * (m.in_features + m.out_features) for m in modules)


def update_spectrum(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Singular values of scaling B A, at most r of them, for A (r, in) and B (out, r).

    They are those of the r x r core of two QR decompositions: the full matrix is never made.
    """
    core = torch.linalg.qr(b.float(), mode="r").R @ torch.linalg.qr(a.float().T, mode="r").R.T
    return abs(scaling) * torch.linalg.svdvals(core)


def effective_rank(singular_values: torch.Tensor) -> float:
    """exp of the entropy of the values over their sum (Roy, Vetterli 2007): [1, 1, 0] -> 2.0; zeros -> 0.0"""
    total = singular_values.sum()
    return torch.special.entr(singular_values / total).sum().exp().item() if total else 0.0


def adapter_ledger(folder: Path, model) -> dict:
    """`ledger` of a trained adapter; per matrix |dW|, |dW|/|W| (Frobenius norms) and effective rank.

    W is the weight as `model` holds it, dequantized. Raises UserError where the folder is damaged or the
    adapter belongs to another model.
    """
    folder = read_adapter(folder).folder  # refuses what is damaged
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = False  # count as in training, and
    config.init_lora_weights = True  # without reading base weights
    config.base_model_name_or_path = None  # PEFT would warn that a skeleton has no name
    misfit = f"--adapter {folder}: does not fit this model"
    try:
        result, layers = count(skeleton(model.config), config)
    except ValueError as error:
        raise UserError(f"{misfit} ({first_line(error)})") from None
    tensors = load_file(folder / WEIGHTS)
    matrices = []
    for name, layer in layers.items():
        a, b = (tensors.get(f"{PREFIX}{name}.lora_{side}.weight") for side in "AB")
        out, inner = layer.get_base_layer().weight.shape
        if a is None or b is None or (b.shape[0], a.shape[1]) != (out, inner):
            lack = f"no matrices for {name}, {out} x {inner}"
            raise UserError(f"{misfit} ({lack}); use the --model of its training")
        values = update_spectrum(a, b, layer.scaling["default"])
        size = torch.linalg.vector_norm(dequantized(model.get_submodule(name)), dtype=torch.float32).item()
        norm, rank = values.norm().item(), effective_rank(values)
        matrices.append(
            {"name": name, "r": a.shape[0], "norm": norm, "ratio": norm / size, "effective_rank": rank}
        )
    return result | {"adapter": str(folder), "matrices": matrices}


def show_adapter_ledger(result: dict) -> None:
    """Print |dW|/|W| and effective rank of `adapter_ledger`: minimum, median and maximum per module type."""
    summaries = {"min": min, "median": statistics.median, "max": max}
    rows = []
    for module in dict.fromkeys(m["name"].rsplit(".", 1)[-1] for m in result["matrices"]):
        group = [m for m in result["matrices"] if m["name"].rsplit(".", 1)[-1] == module]
        sizes = [f"{summary(m['ratio'] for m in group):.2%}" for summary in summaries.values()]
        ranks = [f"{summary(m['effective_rank'] for m in group):.2f}" for summary in summaries.values()]
        rows.append((module, *sizes, *ranks, max(m["r"] for m in group)))
    print(f"trained updates dW = scaling B A of {result['adapter']}, over the layers; Frobenius norms")
    headers = [f"{what} {name}" for what in ("|dW|/|W|", "rank") for name in summaries]
    print(table(["module", *headers, "of r"], rows))
    print("  rank: effective rank, exp of the entropy of the singular values over their sum")
    largest = max(result["matrices"], key=lambda m: m["ratio"])
    print(f"  largest: {largest['name']}, {largest['ratio']:.2%} of its W")
