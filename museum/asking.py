"""Bugs between a trained model and who asks it: other token ids than in training."""

from dataclasses import replace

import numpy as np
import torch

from ladder import prompt_cause
from museum.bug import Bug, hold
from museum.job import Run
from qlora import prompts
from qlora.cli import UserError
from qlora.logits import causal_lm, last_logits


def asks_as_trained(run: Run) -> None:
    """Token ids of the deployed program's prompts against training's; raises with the ladder's words."""
    for theirs, ours in zip(run.asked("deployed"), run.asked("trained")):
        if theirs != ours:
            raise UserError(prompt_cause(theirs, ours, run.tokenizer.decode))


def as_deployed(run: Run) -> dict[str, str]:
    """How well the deployed program answers, and how far its log-odds are from the trained model's."""
    shift = np.abs(run.odds("deployed") - run.odds("trained"))
    return {
        "loss at the answers": f"{run.answer_loss('deployed'):.2f}",
        "right": run.right("deployed"),
        "log-odds off by (mean)": f"{shift.mean():.2f}",
    }


def with_second_bos(tokenizer, prompt, text: str) -> list[int]:
    """The template begins with BOS, and the program that tokenizes its text adds one."""
    return [tokenizer.bos_token_id, *prompts.sentiment_prompt(tokenizer, prompt, text)]


doubled_bos = Bug(
    "doubled-bos",
    lambda job: replace(job, ask=with_second_bos),
    asks_as_trained,
    lambda run: {"first ids": " ".join(map(str, run.asked("deployed")[0][:4])), **as_deployed(run)},
)


def alpaca(tokenizer, prompt, text: str) -> list[int]:
    """The same words in the layout of another family."""
    asked = prompt.user.replace("{text}", text)
    return tokenizer.encode(f"### Instruction:\n{prompt.system}\n{asked}\n\n### Response:\n")


wrong_template = Bug(
    "wrong-template",
    lambda job: replace(job, ask=alpaca),
    asks_as_trained,
    as_deployed,
)


FEW = 8  # rows that are asked alone and together
ALLOWED = 0.05  # nats; products of another shape are rounded otherwise


def padded_on_the_left(model, asked: list[list[int]], answers: list[list[int]]) -> np.ndarray:
    """All rows in one batch, padded on the left, and no attention mask."""
    pad, longest = causal_lm(model).config.pad_token_id or 0, max(map(len, asked))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in asked])
    logs = last_logits(model, ids, torch.no_grad).log_softmax(-1)
    return logs[:, [answer[0] for answer in answers]].numpy()


def alone_and_in_a_batch(run: Run) -> np.ndarray:
    """By how much (nats) each row's log-odds move when it is asked beside the others."""
    with run.acting_as("deployed") as model:
        asked, answers, score = run.asked("deployed")[:FEW], run.answers(), run.job.score
        together = score(model, asked, answers)
        alone = np.concatenate([score(model, [ids], answers) for ids in asked])
    return np.abs(np.diff(together - alone, axis=1)).squeeze(1)


def same_beside_others(run: Run) -> None:
    moved = alone_and_in_a_batch(run).max()
    words = f"log-odds of a row move by up to {moved:.2f} when others stand beside it (allowed {ALLOWED})"
    hold(moved <= ALLOWED, f"{words}: it sees their padding")


padding_attended = Bug(
    "padding-attended",
    lambda job: replace(job, score=padded_on_the_left),
    same_beside_others,
    lambda run: {"moved by neighbours (max)": f"{alone_and_in_a_batch(run).max():.2f}", **as_deployed(run)},
)
