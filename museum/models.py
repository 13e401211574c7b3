"""Models that a bug needs: a random one of two layers, another revision of it, one of large numbers."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from config import BUNDLED
from qlora.batches import collate
from qlora.cli import note
from qlora.sources import locate

FP16_MAX = torch.finfo(torch.float16).max  # 65504


def tiny(folder: Path, seed: int = 0) -> str:
    """A random Llama of two layers and 64 channels with the bundled model's tokenizer; returns its path."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(locate(BUNDLED)[0])
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.15,  # with the usual 0.02 so narrow a model can't make one token likely
        **ids,
    )
    note("           making a random model of two layers …")
    return save(LlamaForCausalLM(config), tokenizer, folder)


def save(model, tokenizer, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def newer_revision(of: str, folder: Path) -> str:
    """The same architecture with other weights, as its makers might upload them under the old name."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(of), AutoTokenizer.from_pretrained(of)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    return save(model, tokenizer, folder)


def with_large_numbers(of: str, folder: Path, examples: list[dict]) -> str:
    """The same function, with a channel between up_proj and down_proj that passes 65504 in some of the rows.

    One row of up_proj is multiplied by c and the column of down_proj that reads it is divided by c.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(of), AutoTokenizer.from_pretrained(of)
    mlp = model.model.layers[0].mlp
    largest = torch.stack(list(largest_of_channels(model, mlp, examples)))  # (rows, channels)
    channel = int((largest.max(0).values / largest.median(0).values).argmax())
    times = FP16_MAX / largest[:, channel].quantile(0.97).item()  # few rows overflow
    with torch.no_grad():
        mlp.up_proj.weight[channel] *= times
        mlp.down_proj.weight[:, channel] /= times
    return save(model, tokenizer, folder)


@torch.no_grad()
def largest_of_channels(model, mlp, examples: list[dict]) -> Iterator[torch.Tensor]:
    """Of each row the largest number that a channel between up_proj and down_proj holds (channels,)."""
    seen: list[torch.Tensor] = []
    hooks = [
        mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(output.abs())),
        mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs())),
    ]
    for example in examples:
        model(collate([example], 0)["input_ids"])
        yield torch.maximum(seen.pop(), seen.pop())[0].amax(0)
    for hook in hooks:
        hook.remove()
