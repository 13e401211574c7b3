"""A .gguf file, and the folder that is unpacked from it once into models/: damage in either."""

from __future__ import annotations

import random
from pathlib import Path

from trials.damage import HOW, hurt, named
from trials.gguf_model import write_gguf
from trials.schedule import Kind
from trials.stubs import empty_models
from trials.verdicts import Verdict, check_answer
from trials.world import System, World

FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FILES += ("generation_config.json", "complete.json")


def plan(_world: World, draw: random.Random) -> list[dict]:
    trials = [{"file": file, "how": how} for file in FILES for how in (*HOW, "gone")]
    trials += [{"file": "model.safetensors", "how": "header flip"} for _ in range(6)]
    # A flipped bit of the .gguf itself makes another model, which nobody has vouched for.
    trials += [{"file": "tiny.gguf", "how": how} for how in ("cut", "cut", "zeros", "empty", "gone")]
    return [{**t, "seed": draw.randrange(1 << 30)} for t in trials]


def use(world: World, system: System, trial: dict) -> Verdict:
    """The first answer unpacks the file; after the damage the second is the same, or refused."""
    with world.folder() as folder:
        models, gguf = folder / "models", folder / "tiny.gguf"
        write_gguf(world.work / "tiny", gguf)
        options = {"before": lambda: empty_models(models)}
        first = world.call(system.answer("none", model=gguf, **options))
        if first.code:
            return Verdict("other", f"undamaged: {first.last_line}")
        done = hurt(target(models, gguf, trial["file"]), trial["how"], random.Random(trial["seed"]))
        return named(check_answer(world.call(system.answer("none", model=gguf, **options)), first), done)


def target(models: Path, gguf: Path, name: str) -> Path:
    if name == gguf.name:
        return gguf
    unpacked = next(p for p in models.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = unpacked / name
    return found if found.exists() else unpacked / "config.json"


KINDS = (
    Kind(
        "damaged unpacked model",
        "bits, cuts, zeros, deleted, in each file that was unpacked from a .gguf, and in that; inference",
        plan,
        use,
    ),
)
