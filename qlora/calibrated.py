"""GPTQ and AWQ: 4-bit codes chosen by what a layer reads, on a few hundred rows of training data.

Both try to keep x W^T, not W. All they need to know of x is its Gram matrix H = sum of x^T x (in, in): the
error of a rounded weight W' is tr((W' - W) H (W' - W)^T). What is written is what other libraries read
(qlora/packed.py), so the folder can be trained on, and used elsewhere.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from config import EVAL_SAMPLES, MODELS_DIR
from qlora.cli import UsageError, UserError, note, progress
from qlora.data import load_rows, split
from qlora.files import broken_files, discard, read_json, seal, staged
from qlora.loading import Base
from qlora.measures import relative_error
from qlora.packed import Packing, packed_tensors
from qlora.prompts import text_ids
from qlora.weights import linear_layers

BITS, TOP = 4, 15
BATCH = 8  # rows that go through a layer at once
DAMPING = 0.01  # of the mean of H's diagonal is added to it, so that it can be inverted
BLOCK = 128  # GPTQ: columns whose updates are applied to the rest of the matrix at once
STRENGTHS = 20  # AWQ: exponents tried
NOTES = "calibration.json"
MAKING = 1  # counts changes of what is made here: folders of an earlier version are not used
# Architectures whose norms multiply by their weight, so that AWQ's scales can go into them.
FOLDABLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def grid(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scales and zeros (out, groups) of codes 0 to 15 that span each group and hold zero exactly.

    Zeros are at least 1: AutoGPTQ's format stores one less.
    """
    blocks = weight.unflatten(1, (-1, group))
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scales = ((high - low) / TOP).half().float()
    scales[scales == 0] = 1.0
    return scales, (-low / scales).round().clamp(1, TOP)


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Codes of the nearest values; shapes that broadcast."""
    return ((weight / scales).round() + zeros).clamp(0, TOP)


def round_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scales, zeros, the values (out, in) that they stand for), each to the nearest."""
    scales, zeros = grid(weight, group)
    s, z = scales[..., None], zeros[..., None]
    codes = nearest(weight.unflatten(1, (-1, group)), s, z)
    return codes.flatten(1), scales, zeros, ((codes - z) * s).flatten(1)


def gptq(weight: Tensor, gram: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GPTQ (arXiv:2210.17323, algorithm 1): round column by column; the others make up for each error.

    Columns with the largest inputs go first ("act-order") and meet no errors yet; each group's grid is fixed
    before, so that groups stay neighbours in the file. Returns what round_groups() does.
    """
    weight, damped = (
        weight.clone(),
        gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device),
    )
    order = gram.diagonal().argsort(descending=True)
    scales, zeros = grid(weight, group)
    weight, damped = weight[:, order], damped[order][:, order]
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    group_of = order // group
    codes, values = torch.empty_like(weight), torch.empty_like(weight)
    for first in range(0, len(gram), BLOCK):
        last = min(first + BLOCK, len(gram))
        errors = torch.empty_like(weight[:, first:last])
        for i in range(first, last):
            s, z = scales[:, group_of[i]], zeros[:, group_of[i]]
            codes[:, i] = nearest(weight[:, i], s, z)
            values[:, i] = (codes[:, i] - z) * s
            error = (weight[:, i] - values[:, i]) / spread[i, i]
            weight[:, i:last] -= error[:, None] * spread[i, i:last]
            errors[:, i - first] = error
        weight[:, last:] -= errors @ spread[first:last, last:]
    back = order.argsort()
    return codes[:, back], scales, zeros, values[:, back]


def awq_scale(weights: list[Tensor], gram: Tensor, group: int) -> Tensor:
    """Factors (in,) by which AWQ stretches weights before rounding (arXiv:2306.00978, equation 5).

    s = (mean size of an input) ^ strength, the strength by trial: the least error of x W^T, all `weights`
    that read x together. Rounding then costs the large inputs less; x is divided by s elsewhere.
    """
    size, best, chosen = gram.diagonal().sqrt(), float("inf"), torch.ones_like(gram[0])
    size = size.clamp(min=1e-4 * size.max())
    for step in range(STRENGTHS):
        s = size ** (step / STRENGTHS)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for weight in weights:
            off = round_groups(weight * s, group)[3] / s - weight
            error += ((off @ gram) * off).sum().item()
        if error < best:
            best, chosen = error, s
    return chosen


@contextmanager
def grams(layers: dict[str, torch.nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """While this is open: {name: sum of x^T x} over all that the layers read."""
    found = {name: torch.zeros(2 * [m.in_features], device=m.weight.device) for name, m in layers.items()}

    def watch(gram: Tensor):
        def before(module, arguments) -> None:
            x = arguments[0].flatten(0, -2).float()
            gram.addmm_(x.t(), x)

        return before

    hooks = [layer.register_forward_pre_hook(watch(found[name])) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class Reached(Exception):
    """The first layer was reached: what it is called with is known."""


def first_inputs(lm, rows: Tensor) -> list[tuple[Tensor, dict]]:
    """What the first decoder layer is called with, for each batch of `rows` (rows, tokens)."""
    calls = []

    def stop(module, arguments, options) -> None:
        calls.append((arguments[0] if arguments else options.pop("hidden_states"), options))
        raise Reached

    hook = layers_of(lm)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in rows.split(BATCH):
            try:
                lm(input_ids=batch.to(lm.device), use_cache=False)
            except Reached:
                continue
    finally:
        hook.remove()
    return calls


def layers_of(lm) -> torch.nn.ModuleList:
    """The decoder layers; raises UserError for models that are built otherwise, or of layers of two kinds."""
    kinds = set(getattr(lm.config, "layer_types", None) or ())
    layers = getattr(getattr(lm, lm.base_model_prefix), "layers", None)
    if layers is None or len(kinds) > 1:
        raise UserError(f"a {type(lm).__name__} can't be calibrated: its layers are not all called alike")
    return layers


def fold(layer, found: dict[str, Tensor], group: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put AWQ's factors of one decoder layer into its weights; `found` becomes what they read then.

    x / s is made by what comes before: a norm's weight, or the rows of another layer (up_proj for down_proj).
    o_proj stays as it is where several heads share their values. Returns the factors by which each layer's
    inputs, and its rows, are not what they were: {name: s (in,)}, {name: s (out,)}.
    """
    attention, mlp, columns, rows = layer.self_attn, layer.mlp, {}, {}
    names = {id(m): name for name, m in layer.named_modules()}
    qkv = {f"self_attn.{name}_proj": getattr(attention, f"{name}_proj") for name in "qkv"}
    places = [(layer.input_layernorm, qkv)]
    if attention.v_proj.out_features == attention.o_proj.in_features:
        places.append((attention.v_proj, {"self_attn.o_proj": attention.o_proj}))
    gate_up = {"mlp.gate_proj": mlp.gate_proj, "mlp.up_proj": mlp.up_proj}
    places += [(layer.post_attention_layernorm, gate_up), (mlp.up_proj, {"mlp.down_proj": mlp.down_proj})]
    for before, readers in places:
        gram = found[next(iter(readers))]
        s = awq_scale([reader.weight for reader in readers.values()], gram, group)
        for name, reader in readers.items():
            reader.weight.mul_(s)
            columns[name], found[name] = s, gram / s / s[:, None]
        before.weight.div_(s if before.weight.dim() == 1 else s[:, None])
        if isinstance(before, torch.nn.Linear):
            rows[names[id(before)]] = s
            if before.bias is not None:
                before.bias.div_(s)
    return columns, rows


@torch.no_grad()
def quantize(
    lm, rows: Tensor, method: str, group: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """(each packed layer's tensors, its error |W' - W| / |W|); `lm`, in fp32, becomes what they stand for.

    `rows`: token ids (rows, tokens). One decoder layer after the other, each reading what the quantized ones
    before it give, as it will later.
    """
    packing = Packing(method, BITS, group, int(method == "gptq"))
    calls, tensors, errors = first_inputs(lm, rows), {}, {}
    inside = {id(layer): name for name, layer in linear_layers(lm)}
    with progress(len(layers_of(lm)), method) as step:
        for layer in layers_of(lm):
            own = {name: m for name, m in layer.named_modules() if id(m) in inside}
            with grams(own) as found:
                for x, options in calls:
                    layer(x, **options)
            exact = {name: m.weight.clone() for name, m in own.items()}
            columns, rows_by = fold(layer, found, group) if method == "awq" else ({}, {})
            for name, m in own.items():
                made = (
                    gptq(m.weight, found[name], group) if method == "gptq" else round_groups(m.weight, group)
                )
                codes, scales, zeros, values = made
                tensors[inside[id(m)]] = packed_tensors(codes.int(), scales, zeros.int(), packing)
                m.weight.copy_(values)
                values = values / columns.get(name, 1.0)
                values = values * rows_by[name][:, None] if name in rows_by else values
                errors[inside[id(m)]] = relative_error(exact[name], values)
            calls = [(_first(layer(x, **options)), options) for x, options in calls]
            step(1)
    return tensors, errors


def _first(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def calibrated_folder(base: Base, rows: Tensor, method: str, group: int, home: Path | None = None) -> Path:
    """A folder of `home` (models/ if not given) with `base` quantized; made once for a model, rows and group.

    `base` is in fp32, and changed. Raises UserError where the method or the group does not fit the model.
    """
    kind, name = type(base.model).__name__, base.info.name
    if method == "awq" and kind not in FOLDABLE:
        raise UserError(f"awq puts its factors into Llama's norms, and this is a {kind}: use gptq")
    for layer_name, layer in linear_layers(base.model):
        if (width := layer.in_features) % group:
            fits = ", ".join(str(g) for g in (128, 64, 32, 16) if not width % g) or "nothing from 16 to 128"
            what = f"--group-size {group} does not divide the {width} inputs of {layer_name}"
            raise UserError(f"{what}; {fits} would")
    about = {"made": MAKING, "base": base.info.revision, "method": method, "bits": BITS, "group_size": group}
    about |= {"rows": len(rows), "tokens_per_row": rows.shape[1]}
    about["ids_sha256"] = sha256(rows.numpy().tobytes()).hexdigest()
    key = sha256(json.dumps(about).encode()).hexdigest()[:8]
    folder = (home or MODELS_DIR) / f"{Path(name.removesuffix('.gguf')).name[:60]}-{method}-g{group}-{key}"
    if broken_files(folder) == []:
        note(f"{method:10} taken from {folder} (made before)")
        return folder
    discard(folder)
    started = time.perf_counter()
    tensors, errors = quantize(base.model, rows, method, group)
    seconds = time.perf_counter() - started
    with staged(folder) as part:
        part.mkdir()
        write_model(part, base, tensors, method, group)
        (part / NOTES).write_text(
            json.dumps({**about, "seconds": seconds, "errors": errors}, indent=1) + "\n"
        )
        seal(part)
    note(f"{method:10} {seconds:.0f} s on {len(rows)} reviews of {rows.shape[1]} tokens; kept in {folder}")
    return folder


def calibration_ids(tokenizer, rows: int, length: int, held_out: int, seed: int) -> torch.Tensor:
    """Token ids (rows, length) of training reviews that have so many; no review that training holds out."""
    found, held_out = load_rows("imdb"), max(held_out, EVAL_SAMPLES)
    reviews, _ = split(found, len(found.rows) - held_out, held_out, seed)
    chosen: list[list[int]] = []
    for text in (row.text for row in reviews if len(row.text) >= length):
        ids = text_ids(tokenizer, text)[:length]
        chosen += [ids] if len(ids) == length else []
        if len(chosen) == rows:
            return torch.tensor(chosen)
    fix = "choose fewer --calibration-rows or a lower --calibration-length"
    raise UsageError(f"only {len(chosen)} training reviews have {length} tokens, {rows} are wanted: {fix}")


def write_model(folder: Path, base: Base, tensors: dict, method: str, group: int) -> None:
    """The model as transformers, vLLM and others read it: packed layers, the rest in fp16."""
    model, packed = base.model, set(tensors)
    state = {k: v.half() for k, v in model.state_dict().items() if k.removesuffix(".weight") not in packed}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    state |= {f"{name}.{key}": tensor for name, held in tensors.items() for key, tensor in held.items()}
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    found = {"quant_method": method, "bits": BITS, "group_size": group}
    if method == "gptq":
        found |= {"desc_act": False, "sym": False, "checkpoint_format": "gptq", "lm_head": False}
    else:
        found |= {"version": "gemm", "zero_point": True, "modules_to_not_convert": ["lm_head"]}
    config = read_json(folder / "config.json", "")
    config |= {"dtype": "float16", "quantization_config": found}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def calibration_notes(model) -> dict:
    """Of a model that was made here: seconds, rows, each layer's error; {} for others."""
    path = Path(model.name_or_path) / NOTES
    return read_json(path, "delete its folder") if path.is_file() else {}
