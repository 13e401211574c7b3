"""Adapters that somebody else made, or that belong elsewhere."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

from trials.damage import copied, named
from trials.hostile_models import YES, Planted, edit, limit_memory
from trials.schedule import Kind
from trials.verdicts import Verdict, check_answer, check_end, check_marker
from trials.world import WEIGHTS, System, World

CONFIG, NOTES, SEAL = "adapter_config.json", "qlora.json", "complete.json"
WRONG = (None, True, -1, 0, 10**9, 1e300, float("nan"), "", "x", [], [1], {}, {"a": 1})


def plan_types(world: World, draw: random.Random) -> list[dict]:
    """Every key of both JSON files, several wrong values; as a foreign adapter, and with hashes beside it."""
    trials = []
    for name in (CONFIG, NOTES):
        content = json.loads((world.qlora.baseline / name).read_text())
        paths = [[key] for key in content]
        paths += [
            [key, inner] for key, value in content.items() if isinstance(value, dict) for inner in value
        ]
        for path in paths:
            trials += [{"file": name, "path": path, "to": to} for to in draw.sample(WRONG, 4)]
        trials += [{"file": name, "whole": t} for t in ("", "[]", "null", "1", "{}", '"x"', "[" * 100)]
    trials = [{**t, "sealed": False} for t in trials]
    trials += [{**t, "sealed": True} for t in draw.sample(trials, 40)]
    for t in trials:
        t["qlora_only"] = t["file"] == NOTES or t["sealed"]
    return trials


def use_types(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        out = copied(system.baseline, folder / system.baseline.name)
        path = out / trial["file"]
        if "whole" in trial:
            path.write_text(trial["whole"] * (100 if trial["whole"].startswith("[[") else 1))
        else:
            content = json.loads(path.read_text())
            *outer, last = trial["path"]
            place = content[outer[0]] if outer else content
            if last in place and place[last] == trial["to"]:
                return Verdict(detail="no change")
            place[last] = trial["to"]
            path.write_text(json.dumps(content))
        if not trial["sealed"]:
            (out / SEAL).unlink(missing_ok=True)
        done = world.call(system.answer(out, stdin=YES, before=limit_memory))
        return check_answer(done, system.reference) if trial["sealed"] else check_end(done)


# What is done, and whether to answer with it would be wrong.
WAYS = {
    "keys of another tool": True,
    "keys of another class": True,
    "no key fits": True,
    "half of the keys": True,
    "one key missing": True,
    "one key more": True,
    "other rank": True,
    "rank in the config only": True,
    "target_modules of one kind": True,
    "target_modules that match nothing": True,
    "endless regular expression": False,
    "lora_alpha 1e9": False,
    "NaN": True,
    "infinity": True,
    "int8": False,
    "a scalar": True,
    "modules_to_save": False,
    "modules_to_save unknown": False,
    "megatron": False,
    "parent_library": False,
    "layer_replication": False,
    "layers_to_transform": False,
    "rank_pattern": False,
    "alpha_pattern": False,
    "other peft_type": True,
    "bias": False,
    "init_lora_weights": False,
    "use_dora": True,
    "eva": False,
    "pickle beside": False,
    "pickle alone": True,
    "tokenizer with code": False,
    "another base": False,
    "base is a path outside": True,
    "unknown key": False,
    "runtime_config": False,
    "huge header": True,
    "the weights are a folder": True,
    "the weights are a link to nowhere": True,
}
CHANGES = {
    "rank in the config only": {"r": 8},
    "target_modules of one kind": {"target_modules": ["q_proj"]},
    "target_modules that match nothing": {"target_modules": ["nothing"]},
    "endless regular expression": {"target_modules": "(.*.*.*.*.*.*.*.*)*(([a-z]+)+)+$x"},
    "lora_alpha 1e9": {"lora_alpha": 1e9},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "modules_to_save unknown": {"modules_to_save": ["nothing"]},
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    "parent_library": {
        "auto_mapping": {"base_model_class": "EvilModel", "parent_library": "evil"},
        "task_type": None,
    },
    "layer_replication": {"layer_replication": [[0, 2]] * 2000},
    "layers_to_transform": {"layers_to_transform": [0, 10**9]},
    "rank_pattern": {"rank_pattern": {"(a+)+$": 10**6, ".*q_proj": 10**6}},
    "alpha_pattern": {"alpha_pattern": {".*": float("nan")}},
    "other peft_type": {"peft_type": "PREFIX_TUNING"},
    "bias": {"bias": "everything"},
    "init_lora_weights": {"init_lora_weights": "evil"},
    "use_dora": {"use_dora": True},
    "eva": {"eva_config": {"rho": -1}, "corda_config": [], "loftq_config": {"loftq_bits": 10**9}},
    "another base": {"base_model_name_or_path": "../../etc"},
    "unknown key": {"evil": "evil.EvilModel"},
    "runtime_config": {"runtime_config": {"ephemeral_gpu_offload": "x"}},
}


def plan_foreign(_world: World, _draw: random.Random) -> list[dict]:
    """With and without our qlora.json beside it."""
    return [{"way": way, "notes": notes} for way in WAYS for notes in (True, False)]


def use_foreign(world: World, system: System, trial: dict) -> Verdict:
    way = trial["way"]
    with world.folder() as folder:
        out, marker = copied(system.baseline, folder / system.baseline.name), folder / "marker"
        (out / SEAL).unlink(missing_ok=True)
        if not trial["notes"]:
            (out / NOTES).unlink(missing_ok=True)
            edit(out / CONFIG, base_model_name_or_path=str(world.work / "tiny"))
        for place in (folder, out):
            (place / "evil.py").write_text(f"open({str(marker)!r}, 'w').write('run')")
        change_adapter(out, way, marker)
        done = world.call(system.answer(out, stdin=YES, cwd=folder, before=limit))
        verdict = check_marker(check_end(done), marker)
        if verdict.survived and done.code == 0 and WAYS[way]:
            return Verdict("silently wrong", f"{way}: exit code 0; {done.last_line}")
        return named(verdict, way)


def limit() -> None:
    """In the child: an endless pattern is given up after seconds, not minutes."""
    from qlora import adapters

    limit_memory()
    adapters.PATTERN_SECONDS = 5


def change_adapter(out: Path, way: str, marker: Path) -> None:
    weights = out / WEIGHTS
    if way in CHANGES:
        edit(out / CONFIG, **CHANGES[way])
    elif way.startswith("pickle"):
        (out / "adapter_model.bin").write_bytes(pickle.dumps(Planted(marker)))
        if way == "pickle alone":
            weights.unlink()
    elif way == "tokenizer with code":
        auto = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
        edit(out / "tokenizer_config.json", auto_map=auto, tokenizer_class="EvilTokenizer")
    elif way == "base is a path outside":
        edit(out / CONFIG, base_model_name_or_path=str(out / "nowhere"))
        if (out / NOTES).exists():
            notes = json.loads((out / NOTES).read_text())
            base = notes["base"] | {"name": str(out / "nowhere"), "public_name": str(out / "nowhere")}
            edit(out / NOTES, base=base)
    elif way == "huge header":
        weights.write_bytes((1 << 62).to_bytes(8, "little") + weights.read_bytes()[8:])
    elif way.startswith("the weights are"):
        weights.unlink()
        weights.mkdir() if "folder" in way else weights.symlink_to("/nowhere/weights")
    else:
        _change_tensors(weights, way)


def _change_tensors(path: Path, way: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    names = sorted(tensors)
    first, prefix = names[0], "base_model.model."
    if way == "keys of another tool":
        tensors = {
            k.replace(prefix, "diffusion_model.").replace("lora_A", "lora_down"): v
            for k, v in tensors.items()
        }
    elif way == "keys of another class":
        tensors = {k.replace(f"{prefix}model.", prefix): v for k, v in tensors.items()}
    elif way == "no key fits":
        tensors = {f"x{i}": v for i, v in enumerate(tensors.values())}
    elif way == "half of the keys":
        tensors = {k: tensors[k] for k in names[::2]}
    elif way == "one key missing":
        del tensors[first]
    elif way == "one key more":
        tensors[first.replace("layers.0", "layers.7")] = tensors[first].clone()
    elif way == "other rank":
        tensors = {
            k: v[:8].contiguous() if "lora_A" in k else v[:, :8].contiguous() for k, v in tensors.items()
        }
    elif way == "int8":
        tensors = {k: (v * 100).char() for k, v in tensors.items()}
    elif way == "a scalar":
        tensors[first] = tensors[first].flatten()[0].clone()
    else:
        tensors[first].view(-1)[5] = float("nan") if way == "NaN" else float("inf")
    save_file(tensors, path, metadata={"format": "pt"})


KINDS = (
    Kind(
        "wrong types in an adapter's JSON",
        "each key of adapter_config.json and qlora.json, four wrong values; some with complete.json",
        plan_types,
        use_types,
        plain=40,
    ),
    Kind(
        "hostile and foreign adapters",
        "keys of other tools, missing matrices, other ranks, NaN, modules to import, pickles, patterns",
        plan_foreign,
        use_foreign,
        plain=30,
    ),
)
