"""What a training step learns from, and through."""

from __future__ import annotations

import torch

from config import BUNDLED, SENTIMENT_ANSWERS
from qlora.batches import collate, encode_rows
from qlora.data import load_rows, split
from qlora.loading import load_tokenizer
from qlora.logits import IGNORE
from qlora.prompts import choose_format
from qlora.qat import GRIDS
from qlora.sources import locate
from truths import Truth, tiny_llama


def labels_that_are_input_ids() -> Truth:
    """Nearly all that is learned then is prompt and padding, and masking by the pad's id hides the end."""
    tokenizer = load_tokenizer(locate(BUNDLED)[0])
    found = load_rows("imdb")
    rows = split(found, 16, 8, seed=42)[0]
    prompt = choose_format("sentiment", found.kind, SENTIMENT_ANSWERS, 256)
    batch = collate(encode_rows(tokenizer, prompt, rows, "training"), tokenizer.pad_token_id)
    answers, positions = (batch["labels"] != IGNORE).sum().item(), batch["input_ids"].numel()
    padding = positions - batch["real_tokens"]
    ends = (batch["labels"] == tokenizer.pad_token_id).sum().item()
    text = (
        f"16 reviews, {positions:,} positions: {answers} are answers, {padding} padding, the rest is prompt "
    )
    text += f"({1 - answers / positions:.1%} of what would be learned); masking by pad id hides {ends} ends"
    return Truth(answers < 0.02 * positions and ends == 16, text)


def straight_through() -> Truth:
    """Rounding has no slope: without a straight-through gradient the weights get none."""
    torch.manual_seed(0)
    weight, x = torch.nn.Parameter(torch.randn(8, 32)), torch.randn(64, 32)
    target, grid = x @ torch.randn(8, 32).T, GRIDS["int4"]

    def loss(w) -> torch.Tensor:
        return (x @ w.T - target).square().mean()

    scale = weight.detach().abs().max() / 7
    plain = torch.autograd.grad(loss(torch.round(weight / scale) * scale), weight)[0]
    copied = grid(
        weight.detach().clone()
    ).requires_grad_()  # a quantized copy of the model, as it is often done
    loss(copied).backward()
    through = lambda: weight + (grid(weight.detach().clone()) - weight).detach()
    losses, optimizer = [], torch.optim.Adam([weight], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(loss(through()))
        losses[-1].backward()
        optimizer.step()
    largest = plain.abs().max().item()
    text = (
        f"largest gradient through rounding {largest:g}; straight through, 100 steps bring the loss of the "
    )
    text += f"rounded weights from {losses[0]:.1f} to {losses[-1]:.1f}"
    return Truth(largest == 0 and losses[-1] < losses[0] / 2, text)


def text_is_no_batch() -> Truth:
    """The Trainer takes token ids; a column of texts is none."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_dict({"text": ["### Instruction: say yes ### Response: yes"] * 4})
    arguments = TrainingArguments(output_dir="never-written", use_cpu=True, report_to=[], disable_tqdm=True)
    try:
        Trainer(model=tiny_llama(), args=arguments, train_dataset=rows).train()
        said = "trained"
    except ValueError as error:
        said = str(error).split(".")[0].split("(")[0].strip()[:90]
    return Truth(said != "trained", f"Trainer on a dataset whose only column is `text`: ValueError: {said} …")
