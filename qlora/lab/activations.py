"""What int8 does to activations: scales measured now or beforehand, and the few columns with huge values.

Weights can be rounded in advance; activations appear at run time, and one huge value makes the steps wide for
all values that share its scale.
"""

import bitsandbytes.functional as F
import torch
from torch import Tensor

from qlora.lab.formats import decode_int8, encode_int8, one_thread
from qlora.logits import hidden_states
from qlora.measures import relative_error
from qlora.tables import table, table_of
from qlora.weights import dequantized, linear_layers

THRESHOLD = 6.0  # LLM.int8's (arXiv 2208.07339): a column with a value of this size is kept in 16 bits
# In the style of IMDB. A static scale is measured on the first half, all errors on the second.
TEXTS = (
    "This film is a complete waste of time; the plot makes no sense and the actors look bored.",
    "A warm, funny and beautifully shot story that stayed with me for days.",
    "I watched it with my brother last night, and we both laughed at the wrong moments.",
    "The director clearly loves the book, but the two hours feel like four.",
    "One of the best performances of her career, and the ending is simply perfect.",
    "Cheap effects, wooden dialogue, and a twist that anyone can see coming from the first scene.",
    "It starts slowly, yet by the second half I had forgotten that I was sitting in a cinema.",
    "My expectations were low. The sequel still managed to disappoint me.",
)
PERCENTILES = (99.99, 99.9)


@one_thread()
def show_activations(model, tokenizer, texts: tuple[str, ...] = TEXTS) -> dict:
    """Print what int8 does to the inputs of the worst of the three layers with the largest ones."""
    inputs, first, calibration = largest_inputs(model, tokenizer, texts)
    layers = {name: describe(x, first) for name, x in inputs.items()}
    columns = {"largest |x|": "{layer}", "in first tokens": "{largest_first:.1f}"}
    columns |= {"in later tokens": "{largest_later:.1f}", "largest/rms, median": "{crest:.1f}"}
    columns[f"columns with |x| >= {THRESHOLD:g}"] = "{outlier_columns} of {columns}"
    read = f"{len(first)} tokens of {len(texts)} sentences"
    print(f"\ninputs of the linear layers, {read}: the {len(inputs)} layers with the largest values")
    print(table_of([{"layer": name, **row} for name, row in layers.items()], columns))
    top, row = next(iter(layers.items()))
    name = max(layers, key=lambda n: layers[n]["crest"])
    print(
        f"  In {top} the first token of a sentence reaches "
        f"{row['largest_first'] / row['largest_later']:.0f} times what any later one\n"
        "  does. largest/rms (root mean square): how few of int8's 127 steps a token's typical values get.\n"
        f"  It is highest in {name}, which follows."
    )
    x, weight = inputs[name].float().cpu(), dequantized(model.get_submodule(name)).float().cpu()
    errors = compare(x, weight, calibration, first, name)
    outliers = keep_outliers(x[~calibration], weight, first[~calibration])
    return {"layers": layers, "layer": name, "errors": errors, "outliers": outliers}


@torch.no_grad()
def largest_inputs(model, tokenizer, texts, keep: int = 3) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(inputs {layer: (tokens, columns)}, first, calibration) of the `keep` layers with the largest values.

    The largest come first. `first` (tokens,) marks the tokens that open a text, `calibration` (tokens,) those
    in the first half of the texts.
    """
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right").to(model.device)
    real = batch.attention_mask.bool()
    kept: dict[str, Tensor] = {}

    def watch(name: str):
        def before(module, arguments) -> None:
            kept[name] = arguments[0].reshape(*real.shape, -1)[real]
            if len(kept) > keep:
                del kept[min(kept, key=lambda n: kept[n].abs().max().item())]

        return before

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear_layers(model)]
    try:
        hidden_states(model, batch.input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    row, place = real.nonzero(as_tuple=True)
    ordered = dict(sorted(kept.items(), key=lambda item: -item[1].abs().max().item()))
    return ordered, (place == 0).cpu(), (row < len(texts) // 2).cpu()


def describe(x: Tensor, first: Tensor) -> dict:
    """How uneven an input (tokens, columns) is; `first` marks the tokens that open a text."""
    size = x.float().abs().cpu()
    crest = size.amax(1) / size.square().mean(1).sqrt()
    return {
        "largest_first": size[first].max().item(),
        "largest_later": size[~first].max().item(),
        "columns": size.shape[1],
        "outlier_columns": (size >= THRESHOLD).any(0).sum().item(),
        "crest": crest.median().item(),
    }


def quantize_static(x: Tensor, limit: float) -> Tensor:
    """x in whole steps of limit/127, read back: one step size for all; larger values are cut to `limit`."""
    return (x * (127 / limit)).round().clamp(-127, 127) * (limit / 127)


def output_error(y: Tensor, exact: Tensor, first: Tensor) -> dict[str, float]:
    """|y - exact| / |exact| of the median later token, of the median first token, of all as one vector."""
    each = (y - exact).norm(dim=1) / exact.norm(dim=1)
    later, opening = each[~first].median().item(), each[first].median().item()
    return {"later": later, "first": opening, "all": relative_error(exact, y)}


def show_errors(errors: dict[str, dict[str, float]]) -> None:
    rows = [(way, *(f"{100 * e[of]:.2f}%" for of in ("later", "first", "all"))) for way, e in errors.items()]
    print(table(["", "later tokens", "first tokens", "all as one vector"], rows))


def compare(x: Tensor, weight: Tensor, calibration: Tensor, first: Tensor, name: str) -> dict:
    """Error of a layer's output x W' with weights, activations or both in int8.

    x: (tokens, in), weight: (out, in). Static scales come from `calibration` tokens, errors from the rest.
    """
    seen, x, first = x[calibration].abs().flatten(), x[~calibration], first[~calibration]
    weight8, exact = decode_int8(*encode_int8(weight)), x @ weight.T
    dynamic, most = decode_int8(*encode_int8(x)), seen.max().item()
    ways = {
        "weights in int8, a scale per output": x @ weight8.T,
        "activations in int8, dynamic: a scale per token": dynamic @ weight.T,
        f"static: one scale, the largest value seen ({most:.4g})": quantize_static(x, most) @ weight.T,
    }
    for percentile in PERCENTILES:
        limit = seen.kthvalue(max(1, round(percentile / 100 * len(seen)))).values.item()
        way = f"static, cut at the {percentile:g}th percentile ({limit:.4g})"
        ways[way] = quantize_static(x, limit) @ weight.T
    ways["weights and activations in int8, dynamic"] = dynamic @ weight8.T
    errors = {way: output_error(y, exact, first) for way, y in ways.items()}
    print(f"\nrelative error of the output of {name}, {len(x)} tokens;")
    print(f"static scales come from {calibration.sum()} tokens of other sentences")
    show_errors(errors)
    print("  Later, first: the median token. As one vector: the tokens with the largest outputs decide.")
    return errors


def keep_outliers(x: Tensor, weight: Tensor, first: Tensor) -> dict:
    """LLM.int8 by hand: columns with a value of THRESHOLD stay out of int8; compared with bitsandbytes."""
    exact, (weight_codes, weight_scale) = x @ weight.T, encode_int8(weight)
    columns = (x.abs() >= THRESHOLD).any(0)
    # As in the library: a token's scale is its largest value below the threshold, in whichever column.
    codes, scale = encode_int8(x.masked_fill(x.abs() >= THRESHOLD, 0))
    codes[:, columns] = 0
    weight8 = decode_int8(weight_codes, weight_scale)
    mixed = decode_int8(codes, scale) @ weight8.T + x[:, columns] @ weight8[:, columns].T
    plain = decode_int8(*encode_int8(x)) @ weight8.T

    their_codes, their_scale, their_columns = F.int8_vectorwise_quant(x.clone(), threshold=THRESHOLD)
    their_weight, their_weight_scale, _ = F.int8_vectorwise_quant(weight)
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        x, their_codes, their_weight, their_scale, their_weight_scale, their_columns
    )
    found = {
        "columns": columns.sum().item(),
        "of": x.shape[1],
        "int8": output_error(plain, exact, first),
        "mixed": output_error(mixed, exact, first),
        "codes_equal_library": torch.equal(codes, their_codes) and torch.equal(weight_codes, their_weight),
        "output_difference": ((theirs - mixed).norm(dim=1) / mixed.norm(dim=1)).max().item(),
    }
    few = f"{found['columns']} of {found['of']} columns"
    print(f"\nas in LLM.int8, {few} stay out of int8: those with a value of {THRESHOLD:g} or more")
    show_errors({"all columns in int8": found["int8"], f"{few} in floating point": found["mixed"]})
    same, off = "the same" if found["codes_equal_library"] else "NOT the same", found["output_difference"]
    print(f"  bitsandbytes' int8 codes are {same}; its output for a token differs by {off:.1e} at most")
    return found
