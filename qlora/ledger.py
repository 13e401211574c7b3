"""What LoRA adds, module type by module type; from a config alone, and for a trained adapter what its updates became."""

from __future__ import annotations

import json
import statistics
import textwrap
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from config import MODELS, NAMED_ADAPTERS
from qlora.adapters import WEIGHTS, read_adapter
from qlora.cli import UsageError, UserError
from qlora.hub import config_file
from qlora.loading import HUB_ID, first_line, locate
from qlora.lora import resolve_targets
from qlora.weights import dequantized

SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text())

# Modules, rank and count of parameters that courses and posts give for Llama 3.2 3B; show_other_models counts.
CLAIM = ("q_proj,v_proj", 16, 8_388_608)

PREFIX = "base_model.model."  # what PEFT puts before a module's name
ADAPTER_BYTES = 4  # adapters are trained and saved in fp32


def model_config(name: str):
    """(transformers config, where it came from) of a preset, a folder, a config.json, a .gguf file or a hub id; reads no weights."""
    preset = {hub_id: key for key, hub_id in MODELS.items()}.get(name, name)
    if preset in SHAPES:
        return AutoConfig.for_model(**SHAPES[preset]), f"preset {preset} (qlora/shapes.json)"
    path = locate(name)[0] if name.lower().endswith(".gguf") else Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists() and HUB_ID.fullmatch(name) and path.suffix != ".json":
        path = config_file(name)
    if path.suffix != ".json" or not path.is_file():
        raise UsageError(f"--model {name}: shapes are known of presets ({', '.join(SHAPES)}), a folder with config.json, a config.json, a .gguf file or a hub id")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False), str(path)
    except (OSError, LookupError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:  # what other files lead to
        raise UserError(f"{path}: not a config that transformers can read ({' '.join(str(error).split())[:160]})") from None


def skeleton(config, dtype: torch.dtype = torch.bfloat16):
    """The model on the meta device: modules, shapes and dtypes without a byte of weights."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"a {config.model_type} model is no causal language model: neither training nor this lab can use it")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def lora_config(model, lora_r: int, lora_alpha: int | None, target_modules: str, lora_variant: str = "lora", lora_dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=lora_r, lora_alpha=lora_alpha or 2 * lora_r, target_modules=resolve_targets(model, target_modules),
        use_rslora=lora_variant == "rslora", use_dora=lora_variant == "dora", lora_dropout=lora_dropout,
    )


def ledger(model, lora_r: int = 16, lora_alpha: int | None = None, target_modules: str = "all-linear", lora_variant: str = "lora") -> dict:
    """Rows per module type, their sum by r (in + out) and PEFT's own count; `model` may be a skeleton, and stays as it is."""
    return _count(model.config, lora_config(model, lora_r, lora_alpha, target_modules, lora_variant))[0]


def _count(model_config, config: LoraConfig) -> tuple[dict, dict]:
    """(ledger, {module name: PEFT's layer on the meta device}): PEFT is let loose on a skeleton, never on the model."""
    frame = skeleton(model_config)
    with torch.device("meta"):
        peft = get_peft_model(frame, config)
    layers = {name.removeprefix(PREFIX): layer for name, layer in peft.named_modules() if isinstance(layer, LoraLayer)}
    rows: dict[tuple, dict] = {}
    for name, layer in layers.items():
        r, (out, inner) = layer.r["default"], layer.get_base_layer().weight.shape
        module = name.rsplit(".", 1)[-1]
        row = rows.setdefault((module, out, inner, r), {"module": module, "layers": 0, "w": [out, inner], "a": [r, inner], "b": [out, r]})
        row["layers"] += 1
    dora = 1 if config.use_dora else 0
    for row in rows.values():
        (out, inner), (r, _) = row["w"], row["a"]
        each = r * (inner + out) + dora * out  # DoRA: one magnitude per row of W
        row |= {"parameters": row["layers"] * each, "bytes": ADAPTER_BYTES * row["layers"] * each, "share_of_w": each / (out * inner)}
    parameters = sum(row["parameters"] for row in rows.values())
    for row in rows.values():
        row["share_of_lora"] = row["parameters"] / parameters
    trainable, total = peft.get_nb_trainable_parameters()
    return {
        "lora_r": config.r, "lora_alpha": config.lora_alpha, "variant": "dora" if dora else "rslora" if config.use_rslora else "lora",
        "scalings": sorted({layer.scaling["default"] for layer in layers.values()}), "rows": list(rows.values()), "parameters": parameters,
        "bytes": ADAPTER_BYTES * parameters, "peft_trainable": trainable, "peft_total": total, "percent": 100 * trainable / total,
    }, layers


def show_ledger(result: dict, name: str) -> None:
    """The table of `ledger` on stdout; `name` says of what."""
    scaling = ", ".join(f"{s:.4g}" for s in result["scalings"])
    rule = "alpha/sqrt(r)" if result["variant"] == "rslora" else "alpha/r"
    kind = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA, one magnitude per row of W included,"}[result["variant"]]
    print(f"{kind} on {name}: r {result['lora_r']}, alpha {result['lora_alpha']}, dW = {scaling} B A ({rule})")
    print(f"  {'module':12} {'layers':>6}   {'W (out x in)':>14}   {'A (r x in)':>12}   {'B (out x r)':>12}   {'parameters':>13}   "
          f"{'MB (fp32)':>9}   {'of LoRA':>7}   {'of its W':>8}")
    for row in result["rows"]:
        w, a, b = (f"{x} x {y}" for x, y in (row["w"], row["a"], row["b"]))
        print(f"  {row['module']:12} {row['layers']:6}   {w:>14}   {a:>12}   {b:>12}   {row['parameters']:13,}   {row['bytes'] / 1e6:9.2f}   "
              f"{100 * row['share_of_lora']:6.1f}%   {100 * row['share_of_w']:7.2f}%")
    layers = sum(row["layers"] for row in result["rows"])
    print(f"  {'sum':12} {layers:6}   {'':14}   {'':12}   {'':12}   {result['parameters']:13,}   {result['bytes'] / 1e6:9.2f}")
    same = "the same" if result["peft_trainable"] == result["parameters"] else f"{result['peft_trainable'] - result['parameters']:+,} against the sum"
    print(f"  PEFT's own count: {result['peft_trainable']:,} trainable of {result['peft_total']:,} ({result['percent']:.2f}%): {same}")


def short_ledger(model) -> list[str]:
    """Lines for a training run: each module type's share of a PEFT model's LoRA parameters, largest first."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            module = name.split(".lora_")[0].rsplit(".", 1)[-1]
            sizes[module] = sizes.get(module, 0) + parameter.numel()
    total = sum(sizes.values())
    shares = [f"{module}\xa0{100 * size / total:.1f}%" for module, size in sorted(sizes.items(), key=lambda item: -item[1])]
    return [line.replace("\xa0", " ") for line in textwrap.wrap(f"of {total:,} LoRA parameters: {', '.join(shares)}", 110)]


def show_other_models() -> dict:
    """Three adapters on every Llama preset, from configs alone, by the sum of r (in + out); on stdout."""
    cases = (CLAIM[:2], NAMED_ADAPTERS["lite"], NAMED_ADAPTERS["full"])
    table = {}
    # Without arguments transformers' Llama is Llama 2 7B, whose counts are often quoted for its successors.
    for name, shapes in {"llama-2-7b": {"model_type": "llama"}, **{n: s for n, s in SHAPES.items() if n.startswith("llama")}}.items():
        frame = skeleton(AutoConfig.for_model(**shapes))
        counts = [lora_parameters(frame, r, resolve_targets(frame, targets)) for targets, r in cases]
        table[name] = {"parameters": frame.num_parameters(), **{f"{targets} r {r}": count for (targets, r), count in zip(cases, counts)}}
    print("LoRA parameters of other models: sum of r (in + out); share of base + LoRA; MB in fp32")
    print(f"  {'model':13} {'base':>13}   " + "   ".join(f"{f'{targets} r {r}':>30}" for targets, r in cases))
    for name, row in table.items():
        base, *counts = row.values()
        print(f"  {name:13} {base:13,}   " + "   ".join(f"{n:13,} {100 * n / (base + n):6.2f}% {ADAPTER_BYTES * n / 1e6:6.1f} MB" for n in counts))
    column, claimed = "{} r {}".format(*CLAIM[:2]), CLAIM[2]
    print(f"  often told of llama-3.2-3b, {column}: {claimed:,}; counted here: {table['llama-3.2-3b'][column]:,}. "
          f"{claimed:,} is the count of {', '.join(name for name, row in table.items() if row[column] == claimed) or 'no model here'}")
    return table


def lora_parameters(model, lora_r: int, targets: list[str]) -> int:
    modules = (m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in targets)
    return sum(lora_r * (m.in_features + m.out_features) for m in modules)


def update_spectrum(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Singular values of scaling B A, at most r of them, by the r x r core of two QRs: the full matrix is never made."""
    core = torch.linalg.qr(b.float(), mode="r").R @ torch.linalg.qr(a.float().T, mode="r").R.T
    return abs(scaling) * torch.linalg.svdvals(core)


def effective_rank(singular_values: torch.Tensor) -> float:
    """exp of the entropy of the values divided by their sum (Roy and Vetterli 2007): [1, 1, 0] -> 2.0; 0.0 for a zero matrix."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(singular_values / total).sum().exp().item()


def adapter_ledger(folder: Path, model) -> dict:
    """`ledger` of a trained adapter (PEFT's format), and per matrix |dW|, |dW|/|W| (Frobenius) and effective rank.

    |W| is of the weights as `model` holds them (dequantized); a skeleton has none, so the ratio is None there.
    """
    read_adapter(folder)  # refuses what is damaged
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode, config.init_lora_weights = False, True  # count as when it was trained, without reading base weights
    config.base_model_name_or_path = None  # PEFT would warn that a skeleton has no name
    try:
        result, layers = _count(model.config, config)
    except ValueError as error:
        raise UserError(f"--adapter {folder}: does not fit this model ({first_line(error)})") from None
    tensors = load_file(folder / WEIGHTS)
    matrices = []
    for name, layer in layers.items():
        a, b = (tensors.get(f"{PREFIX}{name}.lora_{side}.weight") for side in "AB")
        linear = model.get_submodule(name)
        out, inner = layer.get_base_layer().weight.shape
        if a is None or b is None or (b.shape[0], a.shape[1]) != (out, inner):
            raise UserError(f"--adapter {folder}: does not fit this model (no matrices for {name}, {out} x {inner}); use the --model of its training")
        values = update_spectrum(a, b, layer.scaling["default"])
        size = values.norm().item()
        ratio = None if linear.weight.is_meta else size / torch.linalg.vector_norm(dequantized(linear), dtype=torch.float32).item()
        matrices.append({"name": name, "r": a.shape[0], "norm": size, "ratio": ratio, "effective_rank": effective_rank(values)})
    return result | {"adapter": str(folder), "matrices": matrices}


def show_adapter_ledger(result: dict) -> None:
    """|dW|/|W| and effective rank of `adapter_ledger`, smallest, median and largest per module type, on stdout."""
    size = "norm" if result["matrices"][0]["ratio"] is None else "ratio"
    title = "|dW| (no weights loaded: |W| unknown)" if size == "norm" else "|dW|/|W|, Frobenius norms"
    print(f"  trained updates dW = scaling B A of {result['adapter']}; min, median and max over the layers")
    print(f"  {'module':12}   {title:>38}   {'effective rank (exp of entropy)':>34}   {'of r':>5}")
    for module in dict.fromkeys(m["name"].rsplit(".", 1)[-1] for m in result["matrices"]):
        group = [m for m in result["matrices"] if m["name"].rsplit(".", 1)[-1] == module]
        numbers = [f(m[key] for m in group) for key in (size, "effective_rank") for f in (min, statistics.median, max)]
        sizes = "".join(f"{v:13.3f}" if size == "norm" else f"{100 * v:12.2f}%" for v in numbers[:3])
        print(f"  {module:12}  {sizes}   " + "".join(f"{v:11.2f}" for v in numbers[3:]) + f"    {max(m['r'] for m in group):5}")
    largest = max(result["matrices"], key=lambda m: m[size])
    print(f"  largest: {largest['name']}, " + (f"{largest['norm']:.3f}" if size == "norm" else f"{100 * largest['ratio']:.2f}% of its W"))
