"""What int8 does to activations: a scale measured now or beforehand, and the few columns whose values are far too large.

Weights can be rounded at leisure; activations appear at run time, and one huge value stretches the steps of all that share its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora.formats import decode_int8, encode_int8, one_thread
from qlora.logits import hidden_states
from qlora.weights import dequantized

import bitsandbytes.functional as F  # noqa: E402

THRESHOLD = 6.0  # LLM.int8's (arXiv 2208.07339): a column with a value of this size is kept in 16 bits
# In the style of IMDB; a static scale is measured on the first half, and all errors on the second.
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
    """Print what int8 does to the inputs of one layer, the worst of the three with the largest values; returns the figures."""
    inputs, first, calibration = largest_inputs(model, tokenizer, texts)
    print(f"\ninputs of the linear layers, {len(first)} tokens of {len(texts)} sentences: the {len(inputs)} layers with the largest values")
    print(f"  {'largest |x| of a sentence':34}{'in first tokens':>17}{'in later tokens':>17}{f'columns with |x| >= {THRESHOLD:g}':>26}"
          f"{'largest/rms, median':>22}")
    layers = {name: describe(x, first) for name, x in inputs.items()}
    for name, row in layers.items():
        outliers = f"{row['outlier_columns']} of {row['columns']}"
        print(f"  {name:34}{row['largest_first']:>17.1f}{row['largest_later']:>17.1f}{outliers:>26}{row['crest']:>22.1f}")
    top, row = next(iter(layers.items()))
    times = row["largest_first"] / row["largest_later"]
    print(f"  In {top} the first token of a sentence reaches {times:.0f} times what any later one does. The last column")
    print("  says how few of int8's 127 steps a token's typical values get (rms: root mean square): the layer where it is highest follows.")
    name = max(layers, key=lambda n: layers[n]["crest"])
    x, weight = inputs[name].float().cpu(), dequantized(model.get_submodule(name)).float().cpu()
    errors = compare(x, weight, calibration, first, name)
    outliers = keep_outliers(x[~calibration], weight, first[~calibration])
    return {"layers": layers, "layer": name, "errors": errors, "outliers": outliers}


@torch.no_grad()
def largest_inputs(model, tokenizer, texts, keep: int = 3) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs {layer: (tokens, columns)} of the `keep` layers with the largest values, largest first, padding left out;
    which tokens open a text; which belong to the first half of the texts.
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

    head = model.get_output_embeddings()
    hooks = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
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
    return {"largest_first": size[first].max().item(), "largest_later": size[~first].max().item(), "columns": size.shape[1],
            "outlier_columns": (size >= THRESHOLD).any(0).sum().item(), "crest": crest.median().item()}


def quantize_static(x: Tensor, limit: float) -> Tensor:
    """x in whole steps of limit/127, read back; one step size for all, values beyond `limit` are cut to it."""
    return (x * (127 / limit)).round().clamp(-127, 127) * (limit / 127)


def output_error(y: Tensor, exact: Tensor, first: Tensor) -> dict[str, float]:
    """|y - exact| / |exact|: of the median token that opens no text, of the median one that does, of all tokens as one vector."""
    each = (y - exact).norm(dim=1) / exact.norm(dim=1)
    return {"later": each[~first].median().item(), "first": each[first].median().item(), "all": ((y - exact).norm() / exact.norm()).item()}


def compare(x: Tensor, weight: Tensor, calibration: Tensor, first: Tensor, name: str) -> dict:
    """Error of the layer's output x W^T with weights, activations or both in int8; static scales come from the calibration tokens."""
    seen, x, first = x[calibration].abs().flatten(), x[~calibration], first[~calibration]
    weight8, exact = decode_int8(*encode_int8(weight)), x @ weight.T
    dynamic = decode_int8(*encode_int8(x))
    ways = {
        "weights in int8, a scale per output": x @ weight8.T,
        "activations in int8, dynamic: a scale per token": dynamic @ weight.T,
        f"static: one scale, the largest value seen ({seen.max():.4g})": quantize_static(x, seen.max().item()) @ weight.T,
    }
    for percentile in PERCENTILES:
        limit = seen.kthvalue(max(1, round(percentile / 100 * len(seen)))).values.item()
        ways[f"static, cut at the {percentile:g}th percentile ({limit:.4g})"] = quantize_static(x, limit) @ weight.T
    ways["weights and activations in int8, dynamic"] = dynamic @ weight8.T
    errors = {way: output_error(y, exact, first) for way, y in ways.items()}
    print(f"\nrelative error of the output of {name}, {len(x)} tokens; static scales come from {calibration.sum()} tokens of other sentences")
    print(f"  {'':62}{'later tokens':>14}{'first tokens':>14}{'all as one vector':>19}")
    for way, error in errors.items():
        print_errors(way, error)
    print("  Later and first tokens of a sentence: the median of each. As one vector, the tokens with the largest outputs decide.")
    return errors


def print_errors(way: str, error: dict[str, float]) -> None:
    print(f"  {way:62}{100 * error['later']:>13.2f}%{100 * error['first']:>13.2f}%{100 * error['all']:>18.2f}%")


def keep_outliers(x: Tensor, weight: Tensor, first: Tensor) -> dict:
    """LLM.int8 by hand, and how far bitsandbytes' own result is from it: columns with a value of THRESHOLD or more stay out of int8."""
    exact, (weight_codes, weight_scale) = x @ weight.T, encode_int8(weight)
    columns = (x.abs() >= THRESHOLD).any(0)
    # As in the library: a token's scale is the largest of its values below the threshold, in whichever column.
    ordinary = x.masked_fill(x.abs() >= THRESHOLD, 0)
    codes, scale = encode_int8(ordinary)
    codes[:, columns] = 0
    weight8 = decode_int8(weight_codes, weight_scale)
    mixed = decode_int8(codes, scale) @ weight8.T + x[:, columns] @ weight8[:, columns].T
    plain = decode_int8(*encode_int8(x)) @ weight8.T
    found = {"columns": columns.sum().item(), "of": x.shape[1],
             "int8": output_error(plain, exact, first), "mixed": output_error(mixed, exact, first)}

    library_codes, library_scale, library_columns = F.int8_vectorwise_quant(x.clone(), threshold=THRESHOLD)
    library_weight, library_weight_scale, _ = F.int8_vectorwise_quant(weight)
    library, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        x, library_codes, library_weight, library_scale, library_weight_scale, library_columns)
    found["codes_equal_library"] = torch.equal(codes, library_codes) and torch.equal(weight_codes, library_weight)
    found["output_difference"] = ((library - mixed).norm(dim=1) / mixed.norm(dim=1)).max().item()
    print(f"\nthe same, with {found['columns']} of {found['of']} columns out of int8, those with a value of {THRESHOLD:g} or more, as in LLM.int8")
    print_errors("all columns in int8", found["int8"])
    print_errors(f"{found['columns']} columns in floating point", found["mixed"])
    same = "the same" if found["codes_equal_library"] else "not the same"
    print(f"  bitsandbytes' int8 codes are {same}; its output for a token differs by {found['output_difference']:.1e} at most")
    return found
