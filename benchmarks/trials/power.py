"""Power cuts: what of a run is on the disk when only what was flushed is certain.

Two ways. On a model of a disk: a run is killed before its k-th file operation; by then os.fsync has
recorded the content of each file and the list of names of each folder that were flushed. From that and from
what the system still shows, three disks are built:

- "names kept": all names are there, but a file that was not flushed since its last change is empty or zeros;
- "names lost": a folder has the names of its last flush, a file the content of its own last flush;
- "mixed": each folder and each file by itself, as drawn.

On a real one (root only): an ext4 file system in a file, mounted through a loop device with a commit each
second. The file is copied while the run goes on or shortly after it, with the process stopped; the copy is
what the disk would hold after a power cut. Its journal is replayed when it is mounted.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from trials import operations
from trials.schedule import Kind
from trials.verdicts import Verdict
from trials.world import System, World

HOW = ("names kept", "names lost", "mixed")


class Flushes:
    """In the child: what was flushed below a folder, written to `log` where the power is cut."""

    def __init__(self, folder: Path, log: Path, number: int):
        self.folder, self.log, self.number = folder, log, number
        self.files, self.folders, self.held = {}, {}, []

    def watch(self) -> None:
        """For Job.before: cut before the `number`-th file operation."""
        self.fsync, os.fsync = os.fsync, self.flushed
        operations.watch(self.folder, lambda n, *_: self.cut() if n == self.number else None)

    def flushed(self, file) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        self.fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.startswith(str(self.folder.parent)):
            return
        inode = os.fstat(descriptor).st_ino
        self.held.append(os.open(path, os.O_RDONLY))  # or its number could be given to another file
        if os.path.isdir(path):
            self.folders[inode] = names_in(path)
        else:
            self.files[inode] = Path(path).read_bytes()

    def cut(self) -> None:
        self.log.write_bytes(pickle.dumps({"files": self.files, "folders": self.folders}))
        operations.die()


def names_in(folder) -> dict:
    """{name: (inode, is it a folder)}"""
    return {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(folder)}


def rebuild(shown: Path, flushed: dict, made: Path, how: str, draw: random.Random) -> None:
    """Write the disk as it could be after the cut to `made`; `shown` is what the system shows."""
    made.mkdir()
    contents = {p.lstat().st_ino: p.read_bytes() for p in shown.rglob("*") if p.is_file()}
    names = {p.lstat().st_ino: names_in(p) for p in (shown, *shown.rglob("*")) if p.is_dir()}

    def lost() -> bool:
        return how == "names lost" or (how == "mixed" and draw.random() < 0.5)

    def fill(inode: int, target: Path) -> None:
        entries = names.get(inode, {})
        if lost() or inode not in names:
            entries = flushed["folders"].get(inode, {})
        for name, (child, is_folder) in entries.items():
            if is_folder:
                (target / name).mkdir()
                fill(child, target / name)
            else:
                (target / name).write_bytes(content(child))

    def content(inode: int) -> bytes:
        now, safe = contents.get(inode), flushed["files"].get(inode)
        if now is not None and (now == safe or (how == "mixed" and draw.random() < 0.5)):
            return now
        if safe is not None:
            return safe
        return draw.choice((b"", bytes(len(now or b""))))

    fill(shown.stat().st_ino, made)


def plan_model(world: World, draw: random.Random) -> list[dict]:
    count = len(operations.list_operations(world, world.qlora))
    points = [-1] * 12 + sorted(draw.sample(range(1, count + 1), min(count, 40)))
    return [{"k": k, "how": how, "seed": draw.randrange(1 << 30)} for k in points for how in HOW]


def cut_model(world: World, system: System, trial: dict) -> Verdict:
    k = trial["k"]
    if k > 0 and not system.ours:
        ours, theirs = (len(operations.list_operations(world, s)) for s in (world.qlora, system))
        k = 1 + (k - 1) * theirs // ours
    with world.folder() as folder:
        shown, made, log = folder / "disk", folder / "after", folder / "flushed"
        shown.mkdir()
        flushes = Flushes(shown / "out", log, k)
        world.call(system.train(shown / "out", before=flushes.watch, after=flushes.cut))
        flushed = pickle.loads(log.read_bytes())
        rebuild(shown, flushed, made, trial["how"], random.Random(trial["seed"]))
        return world.check_resumed(system, made / "out")


# --- the real one ---


def no_loop_mounts() -> str | None:
    """Why it can't be done here."""
    if os.geteuid():
        return "needs root (a loop mount)"
    if not all(map(shutil.which, ("mkfs.ext4", "mount", "umount"))):
        return "mkfs.ext4 or mount is missing"
    scratch = Path(f"/tmp/qlora-faults-probe-{os.getpid()}")
    scratch.mkdir()
    try:
        with open(scratch / "image", "wb") as image:
            image.truncate(16 << 20)
        with mounted(scratch / "image", scratch / "disk", fresh=True):
            return None
    except subprocess.CalledProcessError:
        return "loop mounts are not possible here"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class mounted:
    """An ext4 image on a loop device, as long as the block lasts."""

    def __init__(self, image: Path, at: Path, fresh: bool = False):
        self.image, self.at, self.fresh = image, at, fresh

    def __enter__(self) -> Path:
        if self.fresh:
            subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True, capture_output=True)
        self.at.mkdir(exist_ok=True)
        command = ["mount", "-o", "loop,commit=1", self.image, self.at]
        subprocess.run(command, check=True, capture_output=True)
        return self.at

    def __exit__(self, *_) -> None:
        subprocess.run(["umount", self.at], check=False, capture_output=True)


def plan_real(_, draw: random.Random) -> list[dict]:
    """Shares of the run's time; the later ones are after its end, when the kernel still holds much back."""
    return [{"at": round(draw.uniform(0.1, 3.0), 3)} for _ in range(54)]


def cut_real(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        image, copy = folder / "image", folder / "copy"
        with open(image, "wb") as file:
            file.truncate(48 << 20)
        with mounted(image, folder / "disk", fresh=True) as disk:
            process = world.start(system.train(disk / "out"))
            ended = False
            while time.monotonic() - process.started < trial["at"] * system.seconds and not ended:
                time.sleep(0.01)
            process.send(signal.SIGSTOP)
            shutil.copyfile(image, copy)
            process.send(signal.SIGKILL)
            process.wait()
        with mounted(copy, folder / "after") as disk:
            verdict = world.check_resumed(system, disk / "out")
        return verdict


KINDS = (
    Kind(
        "power cut, model of a disk",
        "at random operations and the end; what was not flushed is empty, zeros, old or gone; then --resume",
        plan_model,
        cut_model,
        plain=30,
    ),
    Kind(
        "power cut, real file system",
        "copies of a loop-mounted ext4 at random moments, up to two run times after the end; then --resume",
        plan_real,
        cut_real,
        plain=12,
        skip=no_loop_mounts,
        long=True,
    ),
)
