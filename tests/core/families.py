"""Small tokenizers of the kinds that models come with, trained on a few reviews."""

from __future__ import annotations

import json

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # thoughts of earlier replies are left out
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.role == 'user' or loop.last else m.content.split('</think>')[-1].lstrip('\n') }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (  # the shape of v0.3's: system text goes to the last message, and only if that is a user's
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPLIT = (  # how Llama 3 and Qwen part a text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bundled(folder, template: str | None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def llama3(texts: list[str]):
    special = (
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|end_of_text|>",
    )
    backend = bytes_of(texts, special)
    adds(backend, "<|begin_of_text|>")
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=LLAMA3, **ends)


def qwen(texts: list[str]):
    """With <think> and <tool_call>, which are added tokens but not special ones."""
    backend = bytes_of(texts, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    backend.add_tokens(["<think>", "</think>", "<tool_call>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=QWEN3, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def mistral(texts: list[str]):
    """As SentencePiece parts a text, with a space before it."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend = pieces_of(texts, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"), spaces)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    adds(backend, "<s>")
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=MISTRAL, **ends)


def gemma(texts: list[str]):
    """With line breaks and HTML among the added tokens, which are ordinary text."""
    special = ("<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    backend = pieces_of(texts, special, normalizers.Replace(" ", "▁"))
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "\n\n\n", "<b>")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    adds(backend, "<bos>")
    ends = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=GEMMA, **ends)


def bytes_of(texts: list[str], special: tuple[str, ...]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), bytes_])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(list(special))
    return backend


def pieces_of(texts: list[str], special: tuple[str, ...], normalizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.Split("▁", "merged_with_next")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=[*special, *bytes_], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    whole = json.loads(backend.to_str())  # bytes are pieces of the vocabulary, not special tokens
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] in special]
    return tokenizers.Tokenizer.from_str(json.dumps(whole | {"pre_tokenizer": None}))


def adds(backend, bos: str) -> None:
    """BOS before every text."""
    pair = {"single": f"{bos} $A", "pair": f"{bos} $A $B"}
    backend.post_processor = processors.TemplateProcessing(
        **pair, special_tokens=[(bos, backend.token_to_id(bos))]
    )
