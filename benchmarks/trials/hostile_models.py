"""Model folders that somebody else made: planted code, impossible configs, broken weights, wild templates."""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
from pathlib import Path

from trials.damage import copied
from trials.runner import Job
from trials.schedule import Kind
from trials.verdicts import Verdict, check_end, check_marker
from trials.world import System, World, checkpoints, sha256_of

YES = b"y\n" * 20  # transformers asks on stdin whether it may run a model's code
GIB = 1 << 30
# Writes its marker when it is imported, and when its classes are used.
EVIL = """
open({marker!r}, "w").write("run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, *args, **kwargs):
    open({marker!r}, "w").write("run")
"""


class Planted:
    """A pickle that writes a file when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def limit_memory() -> None:
    """A config of a billion layers must not take the machine with it."""
    resource.setrlimit(resource.RLIMIT_AS, (12 * GIB, 12 * GIB))


def use(world: World, system: System, folder: Path, model: Path, how: str, **options) -> Job:
    options = {"stdin": YES, "before": limit_memory, "cwd": folder, **options}
    if how == "train":
        return system.train(folder / "out", model=model, **options)
    return system.answer("none", model=model, hash_logits=False, **options)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- code ---

PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "consolidated.00.pth")
AUTO = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoModel": "evil.EvilModel",
}
TOKENIZER = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}


def plan_code(_world: World, _draw: random.Random) -> list[dict]:
    ways = ["unknown model_type", "known model_type", "tokenizer", "tokenizer class", "generation", "all"]
    ways += [f"pickle beside: {name}" for name in PICKLES] + [f"pickle alone: {name}" for name in PICKLES]
    trials = [{"way": way, "how": how} for way in ways for how in ("train", "answer")]
    files = (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "adapter_model.bin",
        "scaler.pt",
    )
    trials += [{"way": f"checkpoint: {name}", "how": "train"} for name in files]
    return trials


def run_code(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        marker, way = folder / "marker", trial["way"]
        if way.startswith("checkpoint"):
            out = plant_in_checkpoint(system, folder, way.split(": ")[1], marker)
            return check_marker(check_end(world.call(system.train(out, resume=True, stdin=YES))), marker)
        model = copied(world.work / "tiny", folder / "model")
        plant(model, way, marker)
        return check_marker(check_end(world.call(use(world, system, folder, model, trial["how"]))), marker)


def plant(model: Path, way: str, marker: Path) -> None:
    (model / "evil.py").write_text(EVIL.format(marker=str(marker)))
    config, tokenizer = model / "config.json", model / "tokenizer_config.json"
    if way in ("unknown model_type", "all"):
        edit(config, model_type="evil", auto_map=AUTO, architectures=["EvilModel"])
    if way == "known model_type":
        edit(config, auto_map=AUTO)
    if way in ("tokenizer", "all"):
        edit(tokenizer, auto_map=TOKENIZER, tokenizer_class="EvilTokenizer")
    if way == "tokenizer class":
        edit(tokenizer, auto_map=TOKENIZER)
    if way in ("generation", "all"):
        (model / "custom_generate").mkdir()
        shutil.copy(model / "evil.py", model / "custom_generate" / "generate.py")
        edit(model / "generation_config.json", custom_generate=str(model), trust_remote_code=True)
    if way.startswith("pickle"):
        (model / way.split(": ")[1]).write_bytes(pickle.dumps(Planted(marker)))
        if "alone" in way:
            (model / "model.safetensors").unlink()


def plant_in_checkpoint(system: System, folder: Path, name: str, marker: Path) -> Path:
    """Who can write there can also write the hashes anew."""
    out = copied(system.interrupted, folder / "out")
    for checkpoint in checkpoints(out):
        (checkpoint / name).write_bytes(pickle.dumps(Planted(marker)))
        if (seal := checkpoint / "complete.json").exists():
            edit(seal, **{name: sha256_of(checkpoint / name)})
    return out


# --- impossible configs ---

VALUES = (10**9, 10**30, 0, -1, 7, 1e300, float("nan"), "x", "64", None, [], [1], {}, True)
KEYS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *(
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
    ),
    *(
        "head_dim",
        "hidden_act",
        "dtype",
        "torch_dtype",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    ),
    *("pad_token_id", "model_type", "architectures", "attention_dropout", "initializer_range", "use_cache"),
    *("mlp_bias", "attention_bias", "layer_types", "sliding_window", "auto_map", "quantization_config"),
    *("is_encoder_decoder", "id2label", "num_labels", "tp_plan", "base_model_tp_plan", "return_dict"),
)
SPECIAL = (
    *(
        {"quantization_config": {"quant_method": m}}
        for m in ("gptq", "awq", "bitsandbytes", "fp8", "hqq", "x", 1)
    ),
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": "yes"}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": True}},
    {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": []}},
    {"quantization_config": {"quant_method": "torchao", "quant_type": "os.system"}},
    *({k: "kernels-community/flash-attn"} for k in ("attn_implementation", "_attn_implementation")),
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": "paged|sdpa"},
    {"hidden_size": 1 << 16, "intermediate_size": 1 << 18},
    {"hidden_size": 96, "num_attention_heads": 5},
    {"num_hidden_layers": 900},
    {"num_hidden_layers": 1},
    {"rope_parameters": {"rope_type": "yarn", "factor": 0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": "x"}},
    {"model_type": "bert"},
    {"model_type": "t5", "is_encoder_decoder": True},
    {"model_type": "../../evil"},
    {"text_config": {"model_type": "llama"}},
)
WHOLE = (
    "",
    "[]",
    "null",
    "1",
    "{}",
    "[" * 10000,
    '{"a":' * 10000,
    "{'a': 1}",
    "\ufeff{}",
    '{"model_type": "llama"}',
)


def plan_configs(_world: World, draw: random.Random) -> list[dict]:
    trials = [{"change": {key: value}} for key in KEYS for value in draw.sample(VALUES, 4)]
    trials += [{"change": change} for change in SPECIAL for _ in range(2)]
    names = ("config", "tokenizer", "tokenizer_config", "generation_config")
    trials += [{"whole": text[:200], "times": len(text), "file": f} for f in names for text in WHOLE]
    return [{**t, "how": ("answer", "train")[i % 2]} for i, t in enumerate(trials)]


def use_config(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        model = copied(world.work / "tiny", folder / "model")
        if "change" in trial:
            edit(model / "config.json", **trial["change"])
        else:
            whole = trial["whole"] * max(1, trial["times"] // max(1, len(trial["whole"])))
            (model / f"{trial['file']}.json").write_text(whole)
        return check_end(world.call(use(world, system, folder, model, trial["how"])))


# --- weights ---

# What cannot be a model: to answer with it would be wrong.
REFUSED = (
    "a tensor missing",
    "a layer missing",
    "all renamed",
    "NaN",
    "infinity",
    "other shape",
    "transposed",
)
WEIGHTS = (
    *(
        *REFUSED,
        "empty",
        "int8",
        "float64",
        "bool",
        "extra tensors",
        "overlapping offsets",
        "no file",
        "a folder",
    ),
    *("offsets beyond the end", "huge header", "header no JSON", "header of 10,000 levels", "unknown dtype"),
    *("negative shape", "a link", "index to nowhere", "index outside", "index of wrong types", "two files"),
    *("text", "duplicate names", "zeros"),
)


def plan_weights(_world: World, _draw: random.Random) -> list[dict]:
    return [{"way": way, "how": how} for way in WEIGHTS for how in ("answer", "train")]


def use_weights(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        model, way = copied(world.work / "tiny", folder / "model"), trial["way"]
        break_weights(model / "model.safetensors", way)
        done = world.call(use(world, system, folder, model, trial["how"]))
        verdict = check_end(done)
        if verdict.survived and done.code == 0 and way in REFUSED:
            return Verdict("silently wrong", f"{way}: exit code 0")
        return verdict


def break_weights(path: Path, way: str) -> None:
    if way in _TENSORS:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        save_file(_TENSORS[way](tensors, sorted(tensors)[3]), path, metadata={"format": "pt"})
    else:
        _break_file(path, way)


def _one(change):
    return lambda tensors, name: tensors | {name: change(tensors[name]).contiguous()}


def _filled(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


_TENSORS = {
    "a tensor missing": lambda t, n: {k: v for k, v in t.items() if k != n},
    "a layer missing": lambda t, _: {k: v for k, v in t.items() if ".layers.1." not in k},
    "all renamed": lambda t, _: {f"x.{k}": v for k, v in t.items()},
    "NaN": _one(_filled(float("nan"))),
    "infinity": _one(_filled(float("inf"))),
    "other shape": lambda t, _: t | {k: v[:-1].contiguous() for k, v in t.items() if "down_proj" in k},
    "transposed": lambda t, _: t | {k: v.T.contiguous() for k, v in t.items() if "up_proj" in k},
    "empty": _one(lambda v: v[:0]),
    "int8": _one(lambda v: v.char()),
    "float64": _one(lambda v: v.double()),
    "bool": _one(lambda v: v.bool()),
    "extra tensors": lambda t, n: t | {f"extra.{i}": t[n].clone() for i in range(50)},
    "zeros": lambda t, _: {k: v * 0 for k, v in t.items()},
}


def _break_file(path: Path, way: str) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body, name = json.loads(raw[8 : 8 + size]), raw[8 + size :], "model.norm.weight"

    def write(head: bytes | dict, length: int | None = None) -> None:
        head = json.dumps(head).encode() if isinstance(head, dict) else head
        path.write_bytes((len(head) if length is None else length).to_bytes(8, "little") + head + body)

    if way == "overlapping offsets":
        write(header | {name: header[name] | {"data_offsets": [0, 128]}})
    elif way == "offsets beyond the end":
        write(header | {name: header[name] | {"data_offsets": [1 << 40, (1 << 40) + 128]}})
    elif way == "huge header":
        write(raw[8 : 8 + size], length=(1 << 63) - 1)
    elif way == "header no JSON":
        write(b"x" * size)
    elif way == "header of 10,000 levels":
        write(b'{"a":' * 10000)
    elif way == "unknown dtype":
        write(header | {name: header[name] | {"dtype": "F3"}})
    elif way == "negative shape":
        write(header | {name: header[name] | {"shape": [-64]}})
    elif way == "duplicate names":
        write(
            raw[8 : 8 + size].replace(
                b"{", b'{"' + name.encode() + b'":' + json.dumps(header[name]).encode() + b",", 1
            )
        )
    elif way == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif way == "two files":
        (path.parent / "model-2.safetensors").write_bytes(raw[: len(raw) // 2])
    elif way in ("index to nowhere", "index outside", "index of wrong types"):
        target = {"index to nowhere": "nowhere.safetensors", "index outside": "../../../etc/passwd"}.get(
            way, 7
        )
        index = {
            "metadata": {},
            "weight_map": dict.fromkeys((k for k in header if k != "__metadata__"), target),
        }
        (path.parent / "model.safetensors.index.json").write_text(json.dumps(index))
        path.rename(path.parent / "model-00001-of-00001.safetensors")
    else:
        path.unlink()
        if way == "a folder":
            path.mkdir()
        elif way == "a link":
            path.symlink_to("/nowhere/model.safetensors")


# --- chat templates ---

ESCAPE = "__init__.__globals__['os'].system('touch {marker}')"
TEMPLATES = (
    *(
        "{% for",
        "{{ 1/0 }}",
        "{{ x.y.z }}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{% import 'os' as os %}",
        "",
    ),
    *("{{ raise_exception('no') }}", "{% for i in range(10**10) %}{% endfor %}", "{{ 'a' * 10**10 }}"),
    *(
        "{{ 10**10**10 }}",
        "{{ range(10**12)|list }}",
        "{% set a = 'a' %}" + "{% set a = a ~ a %}" * 60 + "{{ a }}",
    ),
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for i in range(300000) %}{{ messages }}{% endfor %}",
    "{{ '%999999999d' % 1 }}",
    "{{ 'x'.ljust(10**11) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    *("{{ cycler." + ESCAPE + " }}", "{{ lipsum." + ESCAPE + " }}", "{{ joiner." + ESCAPE + " }}"),
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self._TemplateReference__context.cycler." + ESCAPE + " }}",
    "{{ messages.append(1) }}{{ messages }}",
    "{% set _ = messages.clear() %}{{ messages[0].content }}",
    "{{ '(a+)+$'|replace('a', 'a'*9999) }}",
    "{{ messages[0]['content']|attr('__class__') }}",
    "{{ ('%s.__class__'|format(1))|map('upper')|list }}",
    "always the same",
    "{{ messages[0]['content'] }}",
    "{{ messages|tojson }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ strftime_now('%Y') }}",
    "\x00\x01",
    "{{ '\ud800' }}",
    "x" * 2_000_000,
)


def plan_templates(_world: World, _draw: random.Random) -> list[dict]:
    return [{"template": i, "how": how} for i in range(len(TEMPLATES)) for how in ("answer", "train")]


def use_template(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        model, marker = copied(world.work / "tiny", folder / "model"), folder / "marker"
        text = TEMPLATES[trial["template"]].replace("{marker}", str(marker))
        (model / "chat_template.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))
        done = world.call(use(world, system, folder, model, trial["how"]), timeout=60 if system.ours else 20)
        verdict = check_marker(check_end(done), marker)
        return Verdict(verdict.name, f"{text[:60]!r}: {verdict.detail}")


KINDS = (
    Kind(
        "planted code",
        "auto_map for config, model, tokenizer; pickles under usual names and in checkpoints; stdin says y",
        plan_code,
        run_code,
        plain=30,
    ),
    Kind(
        "impossible model configs", "sizes, types, quantization, nesting", plan_configs, use_config, plain=40
    ),
    Kind(
        "broken model weights",
        "names, shapes, types, NaN, offsets, headers",
        plan_weights,
        use_weights,
        plain=30,
    ),
    Kind(
        "wild chat templates",
        "syntax errors, endless loops, huge output, escapes from the sandbox",
        plan_templates,
        use_template,
        plain=16,
    ),
)
