"""What temperature, top-k and top-p do to the next token's distribution, and to the text."""

from pathlib import Path

import torch
from torch import Tensor

from qlora.control_tokens import text_ids
from qlora.generation import Sampling, entropy_bits, generate, next_distribution
from qlora.pictures import COLOURS, new_axes, save
from qlora.tables import table, table_of

# temperature, top-k (0: all), top-p (1.0: all). Each temperature alone; then the cuts where they matter: at a
# low temperature top-p leaves one token; at a high one both cut off the long tail of unlikely tokens.
SETTINGS = (
    *((0.5, 0, 1.0), (0.7, 0, 1.0), (1.0, 0, 1.0), (1.5, 0, 1.0)),
    *((0.7, 0, 0.9), (1.0, 0, 0.9), (1.5, 0, 0.9)),
    *((1.5, 50, 1.0), (1.5, 5, 1.0), (1.5, 50, 0.9)),
)
COOL, WARM, HOT = ({"temperature": t} for t in (0.7, 1.0, 1.5))
SAMPLES = ({}, COOL, WARM, HOT, HOT | {"top_p": 0.9}, HOT | {"top_k": 5})  # {}: greedy
SHOWN = 5  # tokens in the table
REPEATED = 4  # tokens that are drawn again to see what the seed does


def show_sampling(base, prompt: str, seed: int, tokens: int = 12) -> dict:
    """Print the distribution after `prompt` for SETTINGS, then seeded samples of `tokens` tokens."""
    ids = text_ids(base.tokenizer, prompt)
    row = torch.tensor([ids], device=base.model.device)
    with torch.inference_mode():
        logits = base.model(input_ids=row).logits[0, -1].float().cpu()
    best = logits.softmax(-1).topk(12).indices
    result = {
        "prompt": prompt,
        "vocabulary": len(logits),
        "tokens": [repr(base.tokenizer.decode([i])) for i in best.tolist()],
        "distributions": [distribution(logits, best, *setting) for setting in SETTINGS],
    }
    show_distributions(result)
    result |= {"seed": seed, "samples": [sample(base, ids, setting, seed, tokens) for setting in SAMPLES]}
    show_samples(result)
    return result


def distribution(logits: Tensor, best: Tensor, temperature: float, top_k: int, top_p: float) -> dict:
    setting = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    p = next_distribution(logits, **setting)
    measures = {"entropy_bits": entropy_bits(p), "survivors": int((p > 0).sum())}
    return {**setting, **measures, "probabilities": p[best].tolist()}


def sample(base, ids: list[int], setting: dict, seed: int, tokens: int) -> dict:
    """What follows `ids` with this seed; whether it begins the same with this seed again, with another."""

    def draw(seed: int, tokens: int) -> list[int]:
        sampling, end = Sampling(**setting, seed=seed), base.tokenizer.eos_token_id
        return generate(base.model, [ids], tokens, sampling, eos_token_id=end)[0]

    drawn = draw(seed, tokens)
    text = base.tokenizer.decode(drawn, skip_special_tokens=True)
    begin, again, other = drawn[:REPEATED], draw(seed, REPEATED), draw(next_seed(seed), REPEATED)
    same = {"repeats": begin == again, "same_with_other_seed": begin == other}
    return {"setting": setting, "text": text, **same}


def next_seed(seed: int) -> int:
    return (seed + 1) % 2**32


def show_distributions(result: dict) -> None:
    columns = {"temperature": "{temperature}", "top-k": "{top_k}", "top-p": "{top_p}"}
    columns |= {"entropy, bits": "{entropy_bits:.2f}", "tokens left": "{survivors:,}"}
    columns |= {token: f"{{probabilities[{i}]:.2%}}" for i, token in enumerate(result["tokens"][:SHOWN])}
    print(f"next token after {result['prompt']!r}, of {result['vocabulary']:,}")
    print(table_of([{**row, "top_k": row["top_k"] or "all"} for row in result["distributions"]], columns))
    for row in result["distributions"]:
        if row["top_k"] and row["survivors"] > row["top_k"]:
            print(f"  top-k {row['top_k']} kept {row['survivors']} tokens: equal logits at the border stay")


def show_samples(result: dict) -> None:
    samples, seed = result["samples"], result["seed"]
    rows = [(setting_name(s["setting"]), " ".join(s["text"].split())) for s in samples]
    print(table([f"samples with seed {seed}", ""], rows, left=2))
    unsteady = [setting_name(s["setting"]) for s in samples if not s["repeats"]]
    steady = [setting_name(s["setting"]) for s in samples if s["same_with_other_seed"]]
    again = f"NOT the same: {'; '.join(unsteady)}" if unsteady else f"all {len(samples)} the same"
    print(
        f"  {REPEATED} tokens drawn again with seed {seed}: {again}; with seed {next_seed(seed)}: "
        f"{len(steady)} the same ({'; '.join(steady) or 'none'})"
    )


def setting_name(setting: dict) -> str:
    """{} -> 'greedy'; {"temperature": 1.5, "top_k": 5} -> 'temperature 1.5, top-k 5'"""
    return ", ".join(f"{key.replace('_', '-')} {value}" for key, value in setting.items()) or "greedy"


def draw_distribution(path: Path, result: dict) -> None:
    """The likeliest tokens' probabilities at each temperature, without top-k and top-p."""
    figure, axes = new_axes(8, 4.5)
    rows = [row for row in result["distributions"] if row["top_k"] == 0 and row["top_p"] == 1]
    for row, colour, style in zip(rows, COLOURS, ("o-", "s--", "D-.", "^:")):
        label = f"temperature {row['temperature']}: entropy {row['entropy_bits']:.1f} bits"
        axes.plot([100 * p for p in row["probabilities"]], style, color=colour, label=label)
    axes.set_xticks(range(len(result["tokens"])), result["tokens"], rotation=35, ha="right")
    axes.set(yscale="log", ylabel="probability of the next token (%)", xlabel="token, likeliest first")
    axes.set_title(f"after: {result['prompt'][-70:]}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    save(figure, path)
