"""The prompt as the model reads it: its tokens with their ids, and who wrote them."""

import os
from dataclasses import dataclass

from qlora import prompts
from qlora.playground.chances import readable


@dataclass(frozen=True)
class Token:
    text: str
    id: int
    kind: str  # "control", "frame" (chat template and question), or "typed"


def tokens(tokenizer, prompt: prompts.PromptFormat | None, ids: list[int]) -> list[Token]:
    """The prompt `ids`, as typed_ids() made it of some text and this format.

    What two texts without a common letter share at both ends is the frame around any text.
    """
    two = [prompts.typed_ids(tokenizer, prompt, text)[0] for text in ("x", "7")]
    before, after = (len(os.path.commonprefix(each)) for each in (two, [row[::-1] for row in two]))
    special = tokenizer.added_tokens_decoder
    control = {token for token, added in special.items() if added.special} | set(tokenizer.all_special_ids)
    found = []
    for i, token in enumerate(ids):
        framed = i < before or i >= len(ids) - after
        kind = "control" if token in control else "frame" if framed else "typed"
        found.append(Token(readable(tokenizer, token), token, kind))
    return found
