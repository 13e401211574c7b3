"""Bugs between the adapter in memory and the one that answers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ladder import Replies, cause
from museum import models
from museum.asking import as_deployed
from museum.bug import Bug, hold
from museum.job import Job, Run
from qlora import adapters
from qlora.measures import relative_error
from reference import scaled_by

SCALED_ROWS = 16


def deployed_adapter(run: Run) -> adapters.Adapter:
    return adapters.read_adapter(run.folder)


def rename_matrices(folder: Path) -> None:
    """As a program that saves from inside a wrapper (DDP, torch.compile) names them."""
    path = folder / adapters.WEIGHTS
    save_file({f"module.{name}": tensor for name, tensor in load_file(path).items()}, path)


adapter_not_applied = Bug(
    "adapter-not-applied",
    lambda job: replace(job, write=rename_matrices),
    lambda run: adapters.check_keys(deployed_adapter(run), run.model, "deployed"),
    lambda run: {**as_deployed(run), "the base alone": f"{run.answer_loss('base'):.2f}"},
)


def forget_rslora(folder: Path) -> None:
    """A reader that knows lora_alpha and r only."""
    path = folder / adapters.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": False}, indent=2))


def said(run: Run, who: str, scaled: dict | None = None) -> Replies:
    """Answers of one model as the parity ladder takes them."""
    base = run.odds("base") if who == "trained" else None
    return Replies(run.asked(who), run.odds(who), [], [], [], {}, base, scaled=scaled or {})


def at_other_strengths(run: Run) -> dict[float, np.ndarray]:
    """{strength: log-odds of the first rows}; what a lost or wrongly scaled adapter would say."""
    root, scaled = run.model.peft_config["default"].r ** 0.5, {}
    for strength in (0, 1 / root, 0.5, 1, 2, root):
        few = replace(run, held_out=run.held_out[:SCALED_ROWS], known={})
        with scaled_by(run.model, strength):
            scaled[strength] = few.odds("trained")
    return scaled


def acts_at_full_strength(run: Run) -> None:
    """The parity ladder's question to answers that are not the trained model's: why?"""
    trained, deployed = said(run, "trained", at_other_strengths(run)), said(run, "deployed")
    off = np.abs(deployed.odds - trained.odds).mean()
    if off > 0.05 * np.abs(trained.odds - trained.base).mean():
        hold(False, cause(trained, deployed, {"rounding": None}, run.tokenizer.decode))


rslora_unscaled = Bug(
    "rslora-unscaled",
    lambda job: replace(job, write=forget_rslora),
    acts_at_full_strength,
    lambda run: {**as_deployed(run), "the base alone": f"{run.answer_loss('base'):.2f}"},
    lambda job, folder: replace(job, variant="rslora", alpha=8),  # 8/sqrt(16) = 2, as 32/16
)


def on_its_own_base(run: Run) -> None:
    """As if the other base had come under the name of the one that was trained on."""
    trained = run.base.info
    onto = replace(run.merged_base, name=trained.name, public_name=trained.public_name)
    adapters.check_base(deployed_adapter(run), onto)


def merge_drift(run: Run) -> dict[str, str]:
    trained, merged = (torch.tensor(run.scores(who)) for who in ("trained", "deployed"))
    off = f"{100 * relative_error(trained, merged):.1f}%"
    return {"log P of the answers off by": off, **as_deployed(run)}


def own_base(job: Job, folder: Path) -> Job:
    tiny = job.model if job.model != Job.model else models.tiny(folder / "base")
    return replace(job, model=tiny, onto=tiny, steps=60, rate=5e-3)


merged_into_wrong_base = Bug(
    "merged-into-wrong-base",
    lambda job: replace(job, onto=models.newer_revision(job.onto, Path(job.onto).parent / "base-again")),
    on_its_own_base,
    merge_drift,
    own_base,
)
