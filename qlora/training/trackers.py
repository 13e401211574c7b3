"""Where a run is logged (--report-to): TensorBoard, trackio, W&B, by the Trainer's own callbacks.

Their files go into the run's folder, unless the user's environment says where. Nothing here reaches the
network by itself: trackio starts no server, and wandb sends what its own settings let it send.
Nothing heavy is imported before the flags are checked.
"""

import contextlib
import netrc
import os
import re
import secrets
import sys
from collections.abc import Iterator
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from qlora import processes
from qlora.cli import require
from qlora.files import write_text

PROJECT = "qlora"  # of trackio and W&B, whose tables compare the runs of a project
PACKAGES = {"wandb": "pip install wandb"}  # the others are pinned
INSTALL = "pip install -r requirements-track.txt"


def chosen(settings) -> list[str]:
    """The trackers that were asked for; `none`, as in TRL's --report_to none, stands for no tracker."""
    return [name for name in dict.fromkeys(settings.report_to) if name != "none"]


def check(settings) -> None:
    """UsageError for flags that do not go together, a package that is missing, or W&B without a login."""
    patience = f"--early-stopping {settings.early_stopping} counts scorings: add --eval-steps, like 50"
    require(settings.early_stopping is None or settings.eval_steps is not None, patience)
    require(settings.run_name is None or settings.run_name.strip() != "", "--run-name is empty")
    for name in chosen(settings):
        missing = f"--report-to {name}: the package is not installed; {PACKAGES.get(name, INSTALL)}"
        require(find_spec(name) is not None, missing)
    if "wandb" in chosen(settings):
        no_login = "--report-to wandb: no login to Weights & Biases was found; run `wandb login`"
        require(wandb_is_ready(), f"{no_login}, or set WANDB_MODE=offline to write files only")


def wandb_is_ready() -> bool:
    """Whether wandb can start without asking: it stays offline, or there is a key (which is not tried)."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    host = (
        os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0].split(":")[0]
    )
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def default_name(settings) -> str:
    """What a run is called: '2026-11-29-smollm2-135m-r16-lr5e-4'"""
    model = re.sub(r"(?i)\.gguf$", "", re.split(r"[/\\]", settings.model.rstrip("/\\"))[-1])
    model = re.sub(r"[^\w.]+", "-", model).strip("-") or "model"
    digits, exponent = f"{settings.learning_rate:.3e}".split("e")
    rate = f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{date.today()}-{model.lower()}-r{settings.lora_r}-lr{rate}"


def prepare(settings, out: Path) -> list[str]:
    """The trackers of this process, of several only the first's; says in the environment where they write.

    Before the Trainer is made: trackio reads its folder once, when it is imported.
    """
    names = chosen(settings) if processes.is_first() else []
    if "trackio" in names:
        os.environ.setdefault("TRACKIO_DIR", str((out / "trackio").absolute()))
    if "wandb" in names:
        (out / "wandb").mkdir(exist_ok=True)
        number = out / "wandb" / "run-id.txt"  # --resume goes on with the same run; --overwrite deletes it
        if not number.exists():
            write_text(number, secrets.token_hex(8))
        own = {"WANDB_DIR": out, "WANDB_PROJECT": PROJECT, "WANDB_RESUME": "allow"}
        for name, value in {**own, "WANDB_RUN_ID": number.read_text(encoding="utf-8")}.items():
            os.environ.setdefault(name, str(value))
    return names


@contextlib.contextmanager
def logging_into(trainer, out: Path, done: int) -> Iterator[None]:
    """While `trainer` trains on after `done` steps; however that ends, what was logged is on the disk.

    What trackers print goes to stderr: stdout holds the result.
    """
    names = trainer.args.report_to
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(out / "tensorboard")
        # Steps after `done` were logged by a process that was killed: TensorBoard forgets them.
        writer = SummaryWriter(os.path.expanduser(folder), purge_step=done + 1 if done else None)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.tb_writer = writer
    if not names:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        if "trackio" in names:
            from trackio.sqlite_storage import SQLiteStorage

            # Else its threads, which share a connection, make the tables, and the first rows can be lost.
            SQLiteStorage.init_db(trainer.args.project)
        try:
            yield
        finally:
            if "trackio" in names:
                import trackio

                if trackio.context_vars.current_run.get():  # after an error: the Trainer did not end it
                    trackio.finish()
