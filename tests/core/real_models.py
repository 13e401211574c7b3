"""Model families as they come: a real chat template, a tokenizer with its special tokens, a tiny model.

The tokenizers are trained on a few reviews; only what stands around the text has to be real.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import families
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).with_name("templates")
TURNS = ("<|im_start|>", "<|im_end|>")
THOUGHTS = ("<think>", "</think>")


@dataclass(frozen=True)
class Family:
    """A chat template with what its tokenizer must have."""

    template: str  # file name in TEMPLATES
    special: tuple[str, ...]
    end: str  # the token that ends a reply
    bos: str | None = None
    eos: str | None = None  # `end` if not given
    added: tuple[str, ...] = ()  # added tokens that are not special
    pieces: bool = False  # tokens of SentencePiece, else of bytes
    right_strip: bool = False  # special tokens swallow the white space after them
    writes_bos: bool = True  # the tokenizer itself puts BOS before a text
    takes_system: bool = True
    thinks: bool = False  # it has a switch for thoughts
    rewrites: bool = False  # earlier replies stand otherwise than where they were asked for
    continues: bool = True  # a given reply follows the prompt as it was asked with
    dated: bool = False


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3 += ("<|eom_id|>", "<|python_tag|>")
GEMMA = ("<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
NEMO = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
PHI3 = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CALLS = ("<tool_call>", "</tool_call>")

FAMILIES = {
    "llama 3.2": Family(
        "meta-llama-Llama-3.2-3B-Instruct", LLAMA3, "<|eot_id|>", bos="<|begin_of_text|>", dated=True
    ),
    "llama 3.1": Family(
        "meta-llama-Llama-3.1-8B-Instruct", LLAMA3, "<|eot_id|>", bos="<|begin_of_text|>", dated=True
    ),
    "qwen 2.5": Family("Qwen-Qwen2.5-7B-Instruct", ("<|endoftext|>", *TURNS), "<|im_end|>", added=CALLS),
    "qwen 3": Family(
        "Qwen-Qwen3-0.6B",
        ("<|endoftext|>", *TURNS),
        "<|im_end|>",
        added=(*CALLS, "<tool_response>", "</tool_response>", *THOUGHTS),
        thinks=True,
        rewrites=True,
    ),
    "qwen 3.5": Family(
        "Qwen3.5-4B",
        ("<|endoftext|>", *TURNS),
        "<|im_end|>",
        added=(*CALLS, *THOUGHTS),
        thinks=True,
        rewrites=True,
    ),
    "qwq": Family(
        "Qwen-QwQ-32B",
        ("<|endoftext|>", *TURNS),
        "<|im_end|>",
        added=(*CALLS, *THOUGHTS),
        thinks=True,
        rewrites=True,
        continues=False,
    ),
    "smollm 3": Family(
        "HuggingFaceTB-SmolLM3-3B",
        ("<|begin_of_text|>", "<|end_of_text|>", *TURNS),
        "<|im_end|>",
        added=THOUGHTS,
        thinks=True,
    ),
    "gemma 2": Family(
        "google-gemma-2-2b-it",
        GEMMA,
        "<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        pieces=True,
        takes_system=False,
    ),
    "mistral nemo": Family(
        "mistralai-Mistral-Nemo-Instruct-2407", NEMO, "</s>", bos="<s>", takes_system=False
    ),
    "phi 3.5": Family(
        "microsoft-Phi-3.5-mini-instruct",
        PHI3,
        "<|end|>",
        bos="<s>",
        eos="<|endoftext|>",
        pieces=True,
        right_strip=True,
        writes_bos=False,
    ),
    "phi 4": Family(
        "microsoft-phi-4", ("<|endoftext|>", *TURNS, "<|im_sep|>"), "<|im_end|>", bos="<|endoftext|>"
    ),
    "deepseek coder": Family(
        "deepseek-ai-deepseek-coder-33b-instruct", (*DEEPSEEK, "<|EOT|>"), "<|EOT|>", bos=DEEPSEEK[0]
    ),
    "deepseek r1": Family(
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
        DEEPSEEK,
        DEEPSEEK[1],
        bos=DEEPSEEK[0],
        added=("<｜User｜>", "<｜Assistant｜>", *THOUGHTS),
        thinks=True,
        rewrites=True,
        continues=False,
    ),
    "granite 3.3": Family(
        "ibm-granite-granite-3.3-2B-Instruct",
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        "<|end_of_text|>",
        dated=True,
    ),
}


def tokenizer_of(family: Family, texts: list[str]) -> PreTrainedTokenizerFast:
    backend = pieces(texts, family.special) if family.pieces else families.bytes_of(texts, family.special)
    if family.right_strip:
        tokens = [AddedToken(t, special=True, normalized=False, rstrip=True) for t in family.special[3:]]
        backend.add_special_tokens(tokens)
    backend.add_tokens([AddedToken(token, normalized=False) for token in family.added])
    if family.bos and family.writes_bos:
        families.adds(backend, family.bos)
    template = (TEMPLATES / f"{family.template}.jinja").read_text()
    names = {"bos_token": family.bos, "eos_token": family.eos or family.end}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, **{k: v for k, v in names.items() if v}
    )


def pieces(texts: list[str], special: tuple[str, ...]) -> tokenizers.Tokenizer:
    backend = families.pieces_of(texts, special, normalizers.Replace(" ", "▁"))
    backend.decoder = families.decoders.Sequence(
        [
            families.decoders.Replace("▁", " "),
            families.decoders.ByteFallback(),
            families.decoders.Fuse(),
        ]
    )
    return backend


@dataclass(frozen=True)
class Architecture:
    """A model of two layers with 64 channels; `family` names the template that it is rehearsed with."""

    family: str
    config: str  # class in transformers
    options: dict = field(default_factory=dict)


ARCHITECTURES = {
    "llama": Architecture("llama 3.2", "LlamaConfig"),
    "deepseek coder": Architecture(
        "deepseek coder", "LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    ),
    "qwen 2.5": Architecture("qwen 2.5", "Qwen2Config"),
    "qwen 3": Architecture("qwen 3", "Qwen3Config", {"head_dim": 32}),
    "gemma 2": Architecture(
        "gemma 2", "Gemma2Config", {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32}
    ),
    "gemma 3": Architecture(
        "gemma 2", "Gemma3TextConfig", {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32}
    ),
    "smollm 3": Architecture("smollm 3", "SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "mistral": Architecture("mistral nemo", "MistralConfig"),
    "phi 3.5": Architecture("phi 3.5", "Phi3Config"),
}


def save_model(name: str, folder: Path, texts: list[str]) -> Path:
    """A random model of that architecture on disk, with its family's tokenizer."""
    kind = ARCHITECTURES[name]
    tokenizer = tokenizer_of(FAMILIES[kind.family], texts)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # with the usual 0.02 the frozen head can't be sure of any token
        "vocab_size": len(tokenizer),
    }
    sizes |= {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id")}
    sizes["pad_token_id"] = None  # torch would make that token's row of the frozen head zero
    config = getattr(transformers, kind.config)(**{**sizes, **kind.options})
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
