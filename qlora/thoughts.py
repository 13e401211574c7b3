"""Models that think before they answer: thoughts stand between <think> and </think>, in front of the reply.

A reply without thoughts is trained and asked for with thoughts switched off. Most chat templates then write
an empty thought into the prompt; where they do not, it is added here. So the model reads it and never learns
to write it.
"""

import functools

import jinja2

from qlora.control_tokens import written

THINK, ANSWER = "<think>", "</think>"
# Stand around a reply while its place is looked for: private characters that no template writes.
BEGIN, END = "\ue001", "\ue002"


def thinks(message: dict) -> bool:
    """Whether a reply brings thoughts: they are learned like the rest of it."""
    return message["role"] == "assistant" and ANSWER in message["content"]


@functools.lru_cache
def empty_thought(tokenizer, template: str) -> str:
    """What has to follow the template's prompt before a reply without thoughts; nothing for most templates.

    Where the prompt opens a thought that can't be switched off, it is "\\n</think>\\n\\n", as Qwen3's
    Thinking models close it in front of a given reply. White space alone belongs to the reply (Mistral's).
    """
    asked = [{"role": "user", "content": "x"}]
    try:
        prompt = written(tokenizer, asked, True)
        whole = written(tokenizer, [*asked, {"role": "assistant", "content": BEGIN}], False)
    except jinja2.TemplateError:  # it takes no such talk
        return ""
    added = whole.partition(BEGIN)[0].removeprefix(prompt) if whole.startswith(prompt) else ""
    if (prompt + added).rstrip().endswith(THINK):
        added += f"\n{ANSWER}\n\n"
    return added if added.strip() else ""
