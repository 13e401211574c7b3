"""What training took away: the loss on text of another kind, and answers to a few general questions.

Held-out rows say what a run gained on its own task. These say what it cost elsewhere.
"""

import hashlib
from pathlib import Path

from config import TrainSettings
from qlora import evaluation, generation, processes, prompts
from qlora.cli import UserError, progress
from qlora.loading import Base
from qlora.tables import markdown_table

# Eight paragraphs of plain facts, written for this purpose: no reviews, no row of any dataset.
NEUTRAL_TEXT = Path(__file__).with_name("neutral.txt")
NEUTRAL_SHA256 = "b0ee4e4f55e3c971de8f5625d5d94509a83f79bf736382d1aca2f28dd22c1faf"
QUESTIONS = (
    "What is the capital of France?",
    "What is 7 times 8?",
    "Which animal gives us wool?",
    "Write one sentence about the sea.",
)
ANSWER_TOKENS = 24


def neutral_paragraphs() -> list[str]:
    """The pinned text; raises UserError where it is another one, whose loss could not be compared."""
    text = NEUTRAL_TEXT.read_text(encoding="utf-8")
    if hashlib.sha256(text.encode()).hexdigest() != NEUTRAL_SHA256:
        raise UserError(f"{NEUTRAL_TEXT}: not the pinned text (sha256); get it again: git checkout")
    return text.strip().split("\n\n")


def measure(base: Base, model, who: str) -> dict:
    """{loss (nats a token), tokens, answers} of a model as it is now. All processes take part."""
    longest = min(TrainSettings.max_length, base.context_length)
    rows = [prompts.lm_example(base.tokenizer, text, longest) for text in neutral_paragraphs()]
    examples = [dict(zip(("input_ids", "labels"), row)) for row in rows]
    with progress(len(processes.my_share(examples)), f"{who}, neutral text") as step:
        result = evaluation.perplexity(model, examples, base.hardware.autocast, step)
    return {"loss": result["loss"], "tokens": result["tokens"], "answers": answers(base, model)}


def answers(base: Base, model) -> list[str]:
    """Greedy answers to QUESTIONS as chat messages, on one line each; the first process's in all of them."""
    tokenizer = base.tokenizer
    asked = [prompts.render(tokenizer, [{"role": "user", "content": each}], True) for each in QUESTIONS]
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(prompts.end_ids(tokenizer))}
    made = generation.generate(model, asked, ANSWER_TOKENS, **ends)
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    return processes.told_by_first([" ".join(text.split()) for text in texts])


def compare(base: Base, model, before: dict) -> dict:
    """The report's `forgetting`; `before`: what measure() said of the base."""
    after = measure(base, model, "tuned")
    pairs = zip(QUESTIONS, before["answers"], after["answers"])
    return {
        "neutral_loss": {"before": before["loss"], "after": after["loss"]},
        "neutral_tokens": after["tokens"],
        "questions": [{"question": q, "before": b, "after": a} for q, b, a in pairs],
    }


def summary(forgetting: dict) -> str:
    """'forgotten? loss on neutral text 3.10 -> 3.15; 1 of 4 general questions is answered differently'"""
    loss, asked = forgetting["neutral_loss"], forgetting["questions"]
    other = sum(each["before"] != each["after"] for each in asked)
    change = f"loss on neutral text {loss['before']:.2f} -> {loss['after']:.2f}"
    return f"forgotten? {change}; {other} of {len(asked)} general questions answered in other words"


def markdown_parts(forgetting: dict) -> list[str]:
    """The report's section, with the answers side by side."""
    loss, asked = forgetting["neutral_loss"], forgetting["questions"]
    change = f"{loss['before']:.3f} nats a token before, {loss['after']:.3f} after"
    text = f"What was forgotten: loss on neutral text ({forgetting['neutral_tokens']} tokens) {change}."
    cells = [[each[key].replace("|", "\\|") for key in ("question", "before", "after")] for each in asked]
    return [text, markdown_table(("general question", "before", "after"), cells)]
