"""Files that changed by themselves, or were lost: bits, cuts, zeros, in every file of a run."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from trials.schedule import Kind
from trials.verdicts import Verdict, check_answer
from trials.world import WEIGHTS, System, World, checkpoints

HOW = ("flip", "flip", "flip", "cut", "zeros", "empty")
UNREAD = ("report.md", "README.md", "curves.png", ".lock", "events")


def hurt(path: Path, how: str, draw: random.Random) -> str:
    """Damage one file; says what was done."""
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return "deleted"
    if how == "cut" and content:
        keep = draw.randrange(len(content))
        os.truncate(path, keep)
        return f"cut to {keep} of {len(content)} bytes"
    if how == "empty" or not content:
        path.write_bytes(b"")
        return "emptied"
    if how == "zeros":
        path.write_bytes(bytes(len(content)))
        return "zeros"
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    place = draw.randrange(min(header, len(content)) if how == "header flip" else len(content))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))
    return f"a bit flipped in byte {place}: {bytes(content[max(0, place - 12) : place + 12])!r}"


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".lock"))
    return target


def named(verdict: Verdict, done: str) -> Verdict:
    return Verdict(verdict.name, f"{done}: {verdict.detail}" if verdict.detail else done)


def refused_or_same(world: World, system: System, out: Path) -> Verdict:
    """--resume of a damaged run: the same bytes, or a clear refusal."""
    return world.check_resumed(system, out, refusal=Verdict())


# --- checkpoints and settings ---


def plan_checkpoints(world: World, draw: random.Random) -> list[dict]:
    newest = checkpoints(world.qlora.interrupted)[0]
    files = sorted(p.name for p in newest.iterdir())
    trials = [{"file": f, "how": how, "which": "newest"} for f in files for how in (*HOW, "gone")]
    trials += [{"file": f, "how": "flip", "which": which} for f in files for which in ("oldest", "all")]
    return [{**t, "seed": draw.randrange(1 << 30)} for t in trials]


def hurt_checkpoint(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        out, draw = copied(system.interrupted, folder / "out"), random.Random(trial["seed"])
        found = checkpoints(out)
        chosen = {"newest": found[:1], "oldest": found[-1:], "all": found}[trial["which"]]
        done = ""
        for checkpoint in chosen:
            if (checkpoint / trial["file"]).exists():
                done = hurt(checkpoint / trial["file"], trial["how"], draw)
        return named(refused_or_same(world, system, out), done)


WRONG = (None, True, -1, 1e300, "", "x", [], [1], {}, {"a": 1})  # for a key that has some other type


def plan_records(world: World, draw: random.Random) -> list[dict]:
    trials = []
    for name in ("settings.json", "before.json"):
        keys = json.loads((world.qlora.interrupted / name).read_text())
        trials += [{"file": name, "how": how} for how in (*HOW, *HOW, *HOW, "gone")]
        trials += [{"file": name, "key": key, "to": draw.choice(WRONG)} for key in keys for _ in range(2)]
        trials += [{"file": name, "whole": text} for text in ("[]", "null", "1", '"x"', "{}", "[" * 10000)]
    return [{**t, "seed": draw.randrange(1 << 30)} for t in trials]


def hurt_record(world: World, system: System, trial: dict) -> Verdict:
    """settings.json and before.json decide how a run goes on."""
    with world.folder() as folder:
        out = copied(system.interrupted, folder / "out")
        path, done = out / trial["file"], "edited"
        if "key" in trial:
            data = json.loads(path.read_text())
            if data[trial["key"]] == trial["to"]:
                return Verdict(detail="no change")
            path.write_text(json.dumps(data | {trial["key"]: trial["to"]}, indent=2) + "\n")
        elif "whole" in trial:
            path.write_text(trial["whole"])
        else:
            done = hurt(path, trial["how"], random.Random(trial["seed"]))
        return named(refused_or_same(world, system, out), done)


# --- the finished adapter ---


def adapter_files(system: System) -> list[str]:
    names = sorted(p.name for p in system.baseline.iterdir() if p.is_file())
    return [n for n in names if not n.startswith(UNREAD)]


def plan_adapters(world: World, draw: random.Random) -> list[dict]:
    trials = []
    for name in adapter_files(world.qlora):
        times = 6 if name in (WEIGHTS, "adapter_config.json", "qlora.json", "complete.json") else 2
        trials += [{"file": name, "how": how} for how in HOW for _ in range(times)]
    trials += [{"file": WEIGHTS, "how": "header flip"} for _ in range(40)]
    trials += [{"file": WEIGHTS, "how": "flip"} for _ in range(60)]
    return [{**t, "seed": draw.randrange(1 << 30)} for t in trials]


def hurt_adapter(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        out = copied(system.baseline, folder / system.baseline.name)
        if not (path := out / trial["file"]).exists():
            path = out / WEIGHTS
        done = hurt(path, trial["how"], random.Random(trial["seed"]))
        return named(check_answer(world.call(system.answer(out)), system.reference), done)


# --- what was deleted ---


def plan_missing(world: World, draw: random.Random) -> list[dict]:
    names = sorted(p.name for p in world.qlora.baseline.iterdir())
    sets = [[name] for name in names] + [draw.sample(names, draw.choice((2, 3, 5))) for _ in range(30)]
    return [{"files": files} for files in sets]


def miss(world: World, system: System, trial: dict) -> Verdict:
    """Inference without them is refused or the same; then --resume makes the run whole again."""
    with world.folder() as folder:
        out = copied(system.baseline, folder / system.baseline.name)
        for name in trial["files"]:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        verdict = check_answer(world.call(system.answer(out)), system.reference)
        return refused_or_same(world, system, out) if verdict.survived else verdict


# --- the base ---


def plan_bases(world: World, draw: random.Random) -> list[dict]:
    files = sorted(p.name for p in (world.work / "tiny").iterdir())
    trials = [{"file": f, "how": how} for f in files for how in (*HOW, "gone") for _ in range(2)]
    trials += [
        {"file": "model.safetensors", "how": how} for how in ("header flip", "flip") for _ in range(12)
    ]
    return [{**t, "seed": draw.randrange(1 << 30)} for t in trials]


def hurt_base(world: World, system: System, trial: dict) -> Verdict:
    """The base that an adapter was trained on, changed after the training: inference must notice.

    A plain folder has no checksums of its own; the adapter's record of its base is what can notice.
    """
    with world.folder() as folder:
        base = copied(world.work / "tiny", folder / "tiny")
        done = hurt(base / trial["file"], trial["how"], random.Random(trial["seed"]))
        return named(
            check_answer(world.call(system.answer(system.baseline, model=base)), system.reference), done
        )


KINDS = (
    Kind(
        "damaged checkpoint",
        "a bit flipped, a cut, zeros, emptied, deleted: each file of the newest or all; then --resume",
        plan_checkpoints,
        hurt_checkpoint,
        plain=40,
    ),
    Kind(
        "damaged settings.json and before.json",
        "bits, cuts, wrong types for each key; then --resume",
        plan_records,
        hurt_record,
    ),
    Kind(
        "damaged adapter",
        "bits, cuts, zeros, in each file; inference gives the same logits or refuses",
        plan_adapters,
        hurt_adapter,
        plain=60,
    ),
    Kind(
        "missing files",
        "of a finished run, one to five; inference, then --resume",
        plan_missing,
        miss,
        plain=20,
    ),
    Kind(
        "damaged base",
        "bits, cuts, zeros, deleted, in each file of the model that an adapter belongs to; inference",
        plan_bases,
        hurt_base,
        plain=30,
    ),
)
