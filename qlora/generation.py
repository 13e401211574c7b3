"""The one place that generates text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
