"""What hashes and fsync take: a checkpoint and an adapter of the bundled model, with and without."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
REPEATS = 7


def main(out: Path) -> None:
    """Writes OUT_cost.json: medians in seconds, and the share of the default run."""
    import torch

    from trials.table import environment

    torch.set_num_threads(2)
    model, optimizer = lora_of_the_default_run()
    record = {"environment": environment(), "repeats": REPEATS}
    for what, optimized in (("checkpoint", optimizer), ("adapter", None)):
        rounds = [(seconds(model, optimized, True), seconds(model, optimized, False)) for _ in range(REPEATS)]
        safe, bare = (statistics.median(column) for column in zip(*rounds))
        record[what] = {"safe_seconds": safe, "bare_seconds": bare, "extra_seconds": safe - bare}
    run = json.loads((ROOT / "benchmarks" / "results" / "default_run.json").read_text())
    checkpoints = run["train"]["steps"] // run["settings"]["save_steps"] + 1
    extra = checkpoints * record["checkpoint"]["extra_seconds"] + record["adapter"]["extra_seconds"]
    record["default_run"] = {"seconds": run["seconds"], "checkpoints": checkpoints, "extra_seconds": extra}
    record["share_of_default_run"] = extra / run["seconds"]
    path = out.with_name(f"{out.name}_cost.json")
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def lora_of_the_default_run():
    """(PEFT model, Adam with the state that it has after a step)"""
    import torch
    from peft import LoraConfig, get_peft_model

    from config import BUNDLED
    from qlora.hardware import detect
    from qlora.loading import load_base

    base = load_base(BUNDLED, "nf4", detect("nf4"))
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base.model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


def seconds(model, optimizer, safe: bool) -> float:
    """Of one write into an empty folder on the disk of this repository."""
    import torch

    from qlora import files

    with tempfile.TemporaryDirectory(dir=ROOT) as folder, contextlib.ExitStack() as stack:
        if not safe:
            stack.enter_context(without_safety())
        started = time.perf_counter()
        with files.scratch(Path(folder)) as aside:
            made = aside / "made"
            model.save_pretrained(made, save_embedding_layers=False)
            if optimizer is not None:
                torch.save(optimizer.state_dict(), made / "optimizer.pt")
            files.seal(made)
            files.publish(made, Path(folder) / "made")
        return time.perf_counter() - started


@contextlib.contextmanager
def without_safety() -> Iterator[None]:
    """Neither hashes nor fsync."""
    with (
        mock.patch("qlora.files.seal", lambda folder: None),
        mock.patch("qlora.files.flush", lambda path: None),
    ):
        yield
