"""Which flags of qlora_finetune.py go together, and what those stand for that were left out."""

import dataclasses

from config import LEARNING_RATE, PREFERENCE_RATE, TrainSettings
from qlora import processes
from qlora.cli import require
from qlora.training import trackers


def checked(s: TrainSettings) -> TrainSettings:
    """The settings with the objective's learning rate; UsageError for flags that exclude each other."""
    require(not (s.resume and s.overwrite), "--resume and --overwrite: choose one of them")
    trains = s.resume or s.overwrite or processes.count() > 1
    require(s.test + s.preview + s.find_lr < 2, "--test, --preview, --find-lr: one thing at a time")
    looks = "--test" if s.test else "--preview" if s.preview else "--find-lr" if s.find_lr else ""
    require(
        not (looks and trains), f"{looks} writes nothing: in one process, without --resume and --overwrite"
    )
    require(not (looks and s.push_to_hub), f"{looks} has nothing to push: leave --push-to-hub out")
    require(s.question is None or s.question.strip() != "", "--question is empty")
    preference = s.objective == "preference"
    require(preference or s.beta == TrainSettings.beta, "--beta is DPO's: add --objective preference")
    require(not (preference and s.packing), "--packing puts texts end to end, not pairs: leave it out")
    rate = s.learning_rate or (PREFERENCE_RATE if preference else LEARNING_RATE)
    s = dataclasses.replace(s, learning_rate=rate)
    trackers.check(s)
    if s.find_lr:
        require(not trackers.chosen(s), "--find-lr reports to nothing: leave --report-to out")
        require(not preference, "--find-lr: not with --objective preference")
    if s.qat:
        alone = f"--qat {s.qat} rounds one merged weight a layer"
        whole = s.lora_variant not in ("dora", "pissa", "olora")
        require(whole, f"{alone}: not with --lora-variant {s.lora_variant}")
        require(s.lora_dropout == 0, f"{alone}, which has no dropout in it: leave --lora-dropout out")
        require(not processes.is_sharded(), f"{alone}: not with the base sharded (FSDP)")
    return s
