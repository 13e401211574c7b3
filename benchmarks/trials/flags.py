"""Flags with wrong values, alone and combined: exit code 2 and one line, before anything is changed."""

from __future__ import annotations

import dataclasses
import random

from trials.runner import Job
from trials.schedule import Kind
from trials.verdicts import Verdict, check_end
from trials.world import System, World

SCRIPTS = {
    "qlora_finetune": "TrainSettings",
    "qlora_inference": "InferSettings",
    "quant_llama32_4bit_lora": "DemoSettings",
}
# No flag takes any of these: text for numbers, numbers out of range, nothing, flags without a value.
FOR_NUMBERS = (
    "x",
    "",
    "-5",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1,5",
    "0x10",
    "١٢x",
    "9" * 400,
    "--",
    "None",
    "1;rm",
    "½",
)
FOR_CHOICES = ("x", "", "NF4", "nf4 ", "none", "0", "--", "nf4,nf4", "🎬")
FOR_SWITCHES = ("maybe", "2", "")
LONG = (
    "–samples",
    "—seed",
    "--smaples",
    "--no-such",
    "-x",
    "---seed",
    "--seed--seed",
    "--",
    "--seed=",
    "--Samples",
)


def wrong(field: dataclasses.Field, draw: random.Random) -> list[str] | None:
    """['--seed', 'x'], or None where any text is a value."""
    flag, kind = "--" + field.name.replace("_", "-"), str(field.type)
    if kind in ("int", "float") or "Optional[int]" in kind:
        may_be_none = "Optional" in kind
        value = draw.choice([number for number in FOR_NUMBERS if not (may_be_none and number == "None")])
        return draw.choice(([flag, value], [f"{flag}={value}"], [flag]))
    if (
        "Literal" in kind
        or kind == "Precision"
        or field.name in ("precision", "objective", "lora_variant", "merge_base")
    ):
        return [flag, draw.choice(FOR_CHOICES)]
    if kind == "bool" or field.type is bool:
        return [f"{flag}={draw.choice(FOR_SWITCHES)}"]
    return None


def fields_of(script: str) -> list[dataclasses.Field]:
    import config

    found = dataclasses.fields(getattr(config, SCRIPTS[script]))
    for field in found:  # int, not <class 'int'>
        field.type = (
            getattr(field.type, "__name__", field.type) if isinstance(field.type, type) else field.type
        )
    return [f for f in found if f.name not in ("prompt", "adapter", "compare")]


def plan(_world: World, draw: random.Random) -> list[dict]:
    trials = []
    for script in SCRIPTS:
        flags = fields_of(script)
        for _ in range(130):
            words = []
            while not words:
                for field in draw.sample(flags, draw.choice((1, 1, 2, 4))):
                    words += wrong(field, draw) or []
            trials.append({"script": script, "flags": words})
        trials += [{"script": script, "flags": [word, "1"]} for word in LONG]
        trials += [{"script": script, "flags": [word], "fine": True} for word in ("--help", "-h")]
    return trials


def call(world: World, _system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        done = world.call(Job(trial["script"], trial["flags"], cwd=folder))
        left = [p.name for p in folder.iterdir()]
    if trial.get("fine"):
        return check_end(done, (0,)) if done.out else Verdict("other", "no help")
    verdict = check_end(done, (2,))
    if verdict.survived and left:
        return Verdict("other", f"refused, but {left[0]} was made")
    return verdict


KINDS = (
    Kind(
        "wrong flags",
        "wrong values and names, one to four at once, of all three scripts: exit code 2",
        plan,
        call,
    ),
)
