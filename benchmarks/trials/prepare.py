"""The process that trials are forked from: everything imported and used once, nothing left running."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import sys
from pathlib import Path

from trials import world as worlds
from trials.runner import Job


def prepare(work: Path, seed: int, systems=("qlora", "plain")) -> worlds.World:
    """Import, call the programs once, so that their caches are warm in each fork; then the reference runs."""
    os.environ["HF_HOME"] = str(work / "huggingface")  # the user's own cache is left alone
    worlds.import_everything()
    remember_predictions()
    world = worlds.make_world(work, seed)
    for system in (getattr(world, name) for name in systems):
        _call_here(system.train(work / f"{system.name}-warm"))
        _call_here(system.answer(work / f"{system.name}-warm"))
    gc.collect()
    gc.freeze()  # the children need not look through a million objects that stay
    gc.unfreeze = lambda: None  # transformers calls it
    worlds.add_references(world, systems)
    return world


def remember_predictions() -> None:
    """The memory plan's trial step takes a third of such a short run and writes nothing: once is enough."""
    from qlora.memory import plan

    known, predict = {}, plan.predict_run

    def remembered(settings, machine, **options):
        key = repr((vars(settings) | {"output_dir": ""}, machine, options))
        if key not in known:
            known[key] = predict(settings, machine, **options)
        return known[key]

    plan.predict_run = remembered


def _call_here(job: Job) -> None:
    """In this process, its output thrown away."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread: it would be missing in the forks
    arguments, sys.argv = sys.argv, [job.script, *map(str, job.args)]
    module = importlib.import_module(job.script)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module.main() if hasattr(module, "main") else module.run()
    finally:
        sys.argv = arguments
