"""How the variants of LoRA in config.LORA_VARIANTS begin, and how those that change the base are saved.

PiSSA (arXiv 2404.02948) and OLoRA (2406.01775) move a part of each frozen weight W into A and B and train
that: W = R + s B0 A0, and the frozen weight is R. LoftQ (2310.08659) lets A and B begin as what quantization
lost. EVA (2410.07170) takes A from the directions that a layer's inputs vary in.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.incremental_pca import IncrementalPCA
from safetensors.torch import save_file

from config import LORA_VARIANTS, PRECISIONS, Variant
from qlora import processes
from qlora.batches import collate
from qlora.cli import UsageError, note, require
from qlora.fast import make_fast
from qlora.hardware import precision_of
from qlora.loading import Base, load_base
from qlora.logits import hidden_states
from qlora.lora import PREFIX
from qlora.weights import dequantized, linear_layers

WEIGHTS = "adapter_model.safetensors"
SVD_PASSES = 16  # of the randomized SVD; as many as PiSSA's
EVA_TOKENS = 8192  # that a layer's directions are taken from


@dataclass
class Start:
    """What is kept of an adapter's first moment, for the guards and for saving."""

    variant: Variant = LORA_VARIANTS["lora"]
    # A0 and B0 where they were split off the base, by their names in a file.
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)
    # LoftQ: |W - Q| and |W - Q - s B A| relative to |W|, of each layer; W original, Q quantized
    distances: dict[str, tuple[float, float]] = field(default_factory=dict)
    untouched: Callable[[Path | None], torch.nn.Module] | None = None  # see untouched_base
    initial: Path | None = None  # folder of the adapter that the run goes on from


def check_variant(name: str, precision: str) -> None:
    """Raises UsageError where a variant can't begin on weights that are held like this."""
    variant, held = LORA_VARIANTS[name], PRECISIONS[precision]
    plain = isinstance(held, str)
    if variant.weights == "16-bit" and not plain:
        why = f"{name} starts from 16-bit weights, and what it saves would not fit the {precision} base"
        raise UsageError(f"--lora-variant {name}: {why}; add --precision bf16")
    if variant.weights == "quantized" and plain:
        why = f"{name} makes up for quantization, and {precision} weights are not quantized"
        raise UsageError(f"--lora-variant {name}: {why}; add --precision nf4")
    if variant.weights == "quantized" and held is None:
        why = f"{name} makes up for what quantization lost, and {precision} files do not hold that"
        raise UsageError(f"--lora-variant {name}: {why}; choose another variant, or a model in 16 bits")
    if processes.is_sharded() and (variant.start in ("split", "original") or variant.reads_rows):
        raise UsageError(f"--lora-variant {name} does not start on a sharded base; choose lora or rslora")


def check_rank(model, targets: list[str], name: str, lora_r: int) -> None:
    """Raises UsageError for a rank that a matrix has not: a decomposition gives no more than min(in, out)."""
    variant = LORA_VARIANTS[name]
    if variant.start not in ("split", "original") and not variant.reads_rows:
        return
    layers = [(n, m) for n, m in linear_layers(model) if n.rsplit(".", 1)[-1] in targets]
    first, least = min(((n, min(m.in_features, m.out_features)) for n, m in layers), key=lambda row: row[1])
    most = f"{name} takes at most {least}, the rank of {first}; lower it or choose --target-modules"
    require(lora_r <= least, f"--lora-r {lora_r}: {most}")


def begin(model, base: Base, examples: list[dict], settings) -> Start:
    """Let the fresh adapter in `model` begin as its variant does; PEFT has put PiSSA's and OLoRA's there."""
    start = Start(LORA_VARIANTS[settings.lora_variant])
    if start.variant.start == "split":
        start.matrices = {k: v.detach().to("cpu", copy=True) for k, v in matrices_of(model).items()}
        start.untouched = lambda folder=None: untouched_base(base, folder)
    elif start.variant.start == "original":
        start.distances = begin_as_loss(model, base)
    elif start.variant.reads_rows:
        begin_as_inputs(model, base, eva_batches(examples, settings.batch_size, settings.lora_r))
    return start


def matrices_of(model) -> dict[str, torch.Tensor]:
    """{PEFT's name in a file: matrix} of the adapter that is trained."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def untouched_base(base: Base, folder: Path | None) -> torch.nn.Module:
    """The base once more, as it is on the disk, with the adapter of `folder`; costs its memory again."""
    info = base.info
    model = load_base(info.name, info.precision, base.hardware, info.revision or None).model
    if folder:
        model = PeftModel.from_pretrained(model, folder)
    make_fast(model, base.hardware.lane)
    return model


@torch.no_grad()
def begin_as_loss(model, base: Base) -> dict[str, tuple[float, float]]:
    """LoftQ's start on a base that stays as it is: s B A is nearest to W - Q, of all matrices of that rank.

    PEFT's replace_lora_weights_loftq moves W to CUDA whatever the device, and leaves out the scale s.
    Returns Start.distances.
    """
    plain = load_base(
        base.info.name, precision_of(base.hardware.dtype), base.hardware, base.info.revision or None
    )
    original, distances = dict(plain.model.named_modules()), {}
    for name, layer in lora_layers(model):
        w, q = (dequantized(m).float() for m in (original[name], layer.get_base_layer()))
        lost, a, b = w - q, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        u, sizes, v = torch.svd_lowrank(lost, len(a), niter=SVD_PASSES)
        root = (sizes / layer.scaling["default"]).sqrt()
        a.copy_(root[:, None] * v.T)
        b.copy_(u * root)
        left = lost - layer.scaling["default"] * b.float() @ a.float()
        distances[name] = (lost.norm() / w.norm()).item(), (left.norm() / w.norm()).item()
    return distances


def lora_layers(model) -> list[tuple[str, LoraLayer]]:
    """(name in the base, PEFT's layer)"""
    return [(n.removeprefix(PREFIX), m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]


@torch.no_grad()
def begin_as_inputs(model, base: Base, batches: list[dict]) -> None:
    """EVA's start: A's rows are the principal directions of what a layer reads, B is zero.

    Each layer keeps its rank: PEFT can also shift ranks between layers, which makes files that a LoRA GGUF
    can't express. All tokens count, not only the labels. PEFT's initialize_lora_eva_weights repeats the rows
    until no direction turns any more, which has no bound; these rows are read once.
    """
    layers, device = lora_layers(model), next(model.parameters()).device
    found = {name: pca(layer.r["default"], layer.in_features) for name, layer in layers}
    last, same = {"name": "", "x": None}, {}

    def look(name, real, x):
        if x is last["x"]:  # q, k and v read the same; gate and up, too
            same[name] = last["name"]
        else:
            last.update(name=name, x=x)
            found[name].partial_fit(x[real].float())

    model.eval()
    for batch in batches:
        real = batch["attention_mask"].bool().to(device)
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name, real=real: look(name, real, args[0]))
            for name, layer in layers
        ]
        with base.hardware.autocast():
            hidden_states(model, batch["input_ids"].to(device), use_cache=False)
        for hook in hooks:
            hook.remove()
    for name, layer in layers:
        layer.lora_A["default"].weight.copy_(found[same.get(name, name)].components_)


def pca(lora_r: int, width: int) -> IncrementalPCA:
    return IncrementalPCA(lora_r, lowrank=True, lowrank_q=min(2 * lora_r, width), lowrank_seed=42)


def eva_batches(examples: list[dict], batch_size: int, lora_r: int) -> list[dict]:
    """About EVA_TOKENS of training rows with a mask of the real ones, at least 2 r of them in a batch."""
    batches, rows, tokens, left = [], [], 0, EVA_TOKENS
    for example in examples:
        rows.append(example)
        tokens += len(example["input_ids"])
        if len(rows) >= batch_size and tokens >= 2 * lora_r and left > 0:
            batches.append({"input_ids": collate(rows, 0)["input_ids"], "attention_mask": real_tokens(rows)})
            left -= tokens
            rows, tokens = [], 0
    few = f"--lora-r {lora_r}: eva needs twice as many training tokens, and a batch of --batch-size rows"
    require(bool(batches), few)
    return batches


def real_tokens(rows: list[dict]) -> torch.Tensor:
    """(rows, tokens), 1 where a token is no padding"""
    widths = torch.tensor([len(row["input_ids"]) for row in rows])
    return (torch.arange(int(widths.max())) < widths[:, None]).long()


def save(model, folder: Path, start: Start) -> None:
    """The adapter in PEFT's format, for the base as it is on the disk."""
    if not start.matrices:
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    config, matrices = as_plain_lora(model, start.matrices)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(matrices, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)
    note(f"adapter    saved as plain LoRA of rank {config.r} on the untouched base")


def as_plain_lora(model, begun: dict[str, torch.Tensor]):
    """(config, matrices): what was learned is s (B A - B0 A0) = s [B, -B0] [A; A0], of twice the rank.

    As PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), but from memory: PEFT wants the
    beginning on the disk, and loads it into the model as a second adapter.
    """
    config, joined = copy.deepcopy(model.peft_config["default"]), {}
    for name, matrix in matrices_of(model).items():
        here, first = matrix.detach().cpu(), begun[name]
        joined[name] = torch.cat([here, first]) if "lora_A" in name else torch.cat([here, -first], dim=1)
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha  # the scale alpha / r stays
    config.init_lora_weights, config.inference_mode = True, True
    return config, joined
