"""Disks that fill up, and files that may not grow: a tmpfs of a few sizes, few inodes, RLIMIT_FSIZE."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

from trials.schedule import Kind
from trials.verdicts import Verdict, check_end
from trials.world import System, World

ROOMY = "size=200m,nr_inodes=20000"


def bytes_of(folder: Path) -> int:
    return sum((p.stat().st_size + 4095) // 4096 * 4096 for p in folder.rglob("*") if p.is_file())


def plan(world: World, draw: random.Random) -> list[dict]:
    """Sizes as shares of a finished run's, dense around its end; inodes; largest files."""
    shares = [*(i / 28 for i in range(28)), *(draw.uniform(0.7, 1.4) for _ in range(20))]
    trials = [{"what": "size", "share": round(s, 4)} for s in shares]
    trials += [{"what": "inodes", "count": n} for n in range(2, 54, 2)]
    trials += [{"what": "largest file", "bytes": int(4 * 1.32**n)} for n in range(4, 46)]
    return trials


def fill(world: World, system: System, trial: dict) -> Verdict:
    """A run on a disk that is too small: it says so; with room made, it goes on."""
    options = ROOMY
    if trial["what"] == "size":
        options = f"size={max(4096, int(trial['share'] * bytes_of(system.baseline)))}"
    elif trial["what"] == "inodes":
        options = f"nr_inodes={trial['count']}"
    with world.folder() as folder:
        disk = folder / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
        try:
            out = disk / "out"
            done = world.call(system.train(out, before=lambda: limit(trial)))
            verdict = check_end(done)
            if not verdict.survived:
                return verdict
            subprocess.run(["mount", "-o", f"remount,{ROOMY}", disk], check=True)
            return world.check_resumed(system, out)
        finally:
            subprocess.run(["umount", "-l", disk], check=False)


def limit(trial: dict) -> None:
    """Python ignores SIGXFSZ, so a write past the limit is EFBIG."""
    if trial["what"] == "largest file":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # stdout and stderr are files, too; they get less than a kilobyte before anything else is written
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(trial["bytes"], 4096), resource.RLIM_INFINITY))


def no_tmpfs() -> str | None:
    if os.geteuid() or not shutil.which("mount"):
        return "needs root (a tmpfs)"
    probe = Path(f"/tmp/qlora-faults-tmpfs-{os.getpid()}")
    probe.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", probe], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", probe], check=False)
    probe.rmdir()
    return "tmpfs mounts are not possible here" if done.returncode else None


KINDS = (
    Kind(
        "full disk",
        "a file system of growing size, few inodes, or a largest file size; then room is made and --resume",
        plan,
        fill,
        plain=30,
        skip=no_tmpfs,
    ),
)
