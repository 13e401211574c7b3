"""The one place that generates text."""

import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, set_seed

from qlora.fast import one_product
from qlora.logits import causal_lm


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = 42


@torch.inference_mode()
def generate(
    model, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = Sampling(), **options
) -> list[list[int]]:
    """Token ids that continue each prompt, the prompt itself left out.

    Prompts are padded on the left, so that all of them end at the same position. What the model ships as its
    own generation defaults (repetition penalty, top-p) does not count. `options` go to GenerationConfig
    (eos_token_id, pad_token_id, min_new_tokens, max_time) or, if `streamer`, to model.generate.
    """
    set_seed(sampling.seed)
    streamer, pad = options.pop("streamer", None), options.setdefault("pad_token_id", 0)
    options |= {"max_new_tokens": max_new_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    config = GenerationConfig(**options)
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
    lm = causal_lm(model)
    shipped, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        with one_product(model):
            out = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer
            )
    finally:
        lm.generation_config = shipped
    return out[:, longest:].tolist()


def steps(
    read: Callable[[Tensor], Tensor], ids: Tensor, length: int, sampling: Sampling, ends: Set[int]
) -> Iterator[tuple[list[int], Tensor]]:
    """Token by token, for who looks on: (next token of each row, the logits (rows, vocabulary) it is of).

    `read` takes what is new, at first the prompts `ids` (rows, tokens), and returns the logits after it; the
    cache is its own. All rows draw by the same random numbers, so that where they differ their models do. A
    row that has ended goes on with its end token until all have, or `length` tokens are there.
    """
    dice = [torch.Generator().manual_seed(sampling.seed) for _ in ids]
    ended: dict[int, int] = {}  # row -> its end token
    for _ in range(length):
        logits = read(ids)
        chosen = [ended.get(i, -1) for i in range(len(logits))]
        for i, row in enumerate(logits):
            if i not in ended:
                chosen[i] = draw(row, sampling, dice[i])
                ended |= {i: chosen[i]} if chosen[i] in ends else {}
        yield chosen, logits
        if len(ended) == len(logits):
            return
        ids = torch.tensor(chosen)[:, None]


def draw(logits: Tensor, sampling: Sampling, dice: torch.Generator) -> int:
    """A token by its logits (vocabulary,): the likeliest, or by chance from next_distribution()."""
    if not sampling.temperature:
        return int(logits.argmax())
    p = next_distribution(logits.cpu(), sampling.temperature, sampling.top_k, sampling.top_p)
    return int(p.multinomial(1, generator=dice))


def next_distribution(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities (vocabulary,) after temperature, then top-k, then top-p, as `generate` applies them.

    log [0.5, 0.3, 0.2], top_p 0.7 -> [0.625, 0.375, 0]: the fewest tokens that reach 0.7 together.
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


def entropy_bits(p: Tensor) -> float:
    """[0.5, 0.25, 0.25] -> 1.5"""
    return torch.special.entr(p).sum().item() / math.log(2)
