"""Several adapters in one: what the sum is, what it is made of, and which adapters do not go together."""

import json
import math
import shutil

import pytest
import torch
from conftest import here
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.adapters import read_adapter
from qlora.files import broken_files

SCRIPT, WEIGHTS, CONFIG, NOTES = (
    "qlora_inference.py",
    "adapter_model.safetensors",
    "adapter_config.json",
    "qlora.json",
)


def changed(folder, out, config=None, notes=None, matrices=lambda name, matrix: matrix):
    """A copy of an adapter with other entries in its files."""
    shutil.copytree(
        folder, out, ignore=shutil.ignore_patterns("checkpoint-*", "complete.json", "*.md", ".lock")
    )
    for file, new in ((CONFIG, config), (NOTES, notes)):
        content = json.loads((out / file).read_text())
        for key, value in (new or {}).items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        (out / file).write_text(json.dumps(content))
    found = {k: matrices(k, v).contiguous() for k, v in load_file(out / WEIGHTS).items()}
    save_file(found, out / WEIGHTS, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def pair(trained, tmp_path_factory):
    """The trained adapter, and another one of the same rank from other numbers; trained on other rows."""
    torch.manual_seed(1)
    noise = lambda name, matrix: 0.05 * torch.randn(matrix.shape)
    rows = {"dataset": {"name": "rotten_tomatoes", "seed": 7, "eval_samples": 6}}
    return trained, changed(trained, tmp_path_factory.mktemp("pair") / "other", notes=rows, matrices=noise)


def combined(out, *parts, kind="cat", more=()):
    done = here(SCRIPT, "--combine", *parts, "--combination", kind, "--output-dir", out, *more)
    assert done.returncode == 0, done.stderr
    return done.stderr


def updates(folder) -> dict:
    """{layer: s B A} by the files alone"""
    config, matrices = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    layers = [k.removesuffix(".lora_A.weight") for k in matrices if "lora_A" in k]
    return {k: scale * matrices[f"{k}.lora_B.weight"] @ matrices[f"{k}.lora_A.weight"] for k in layers}


def same(ours: dict, theirs: dict, tolerance=1e-5) -> bool:
    return ours.keys() == theirs.keys() and all(
        (ours[k] - theirs[k]).norm() <= tolerance * theirs[k].norm() for k in ours
    )


def weighted(a: dict, b: dict, *weights) -> dict:
    return {k: weights[0] * a[k] + weights[1] * b[k] for k in a}


def test_linear_of_one_adapter_is_that_adapter(pair, tmp_path):
    combined(tmp_path / "one", pair[0], kind="linear")
    assert same(updates(tmp_path / "one"), updates(pair[0]))


def test_rslora_keeps_its_scale(pair, tmp_path):
    # PEFT 0.21 hands use_rslora on to the combination, which is scaled by sqrt(r) once more
    rs = changed(pair[0], tmp_path / "rs", config={"use_rslora": True})
    for kind in ("linear", "cat"):
        combined(tmp_path / kind, rs, kind=kind)
        assert same(updates(tmp_path / kind), updates(rs))


def test_cat_is_the_exact_sum_and_loads_everywhere(pair, tiny_folder, tmp_path):
    out = tmp_path / "sum"
    told = combined(out, f"{pair[0]}:0.7", f"{pair[1]}:-0.3")
    sum_of = weighted(updates(pair[0]), updates(pair[1]), 0.7, -0.3)
    assert same(updates(out), sum_of) and json.loads((out / CONFIG).read_text())["r"] == 32
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), out)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    key = next(k for k in sum_of if k.endswith("layers.1.mlp.up_proj"))
    assert torch.allclose(layer.get_delta_weight("default"), sum_of[key], atol=1e-6)
    assert broken_files(out) == [] and not (out / "README.md").exists()
    assert here(SCRIPT, "--adapter", out, "--max-new-tokens", "2", "A fine film.").returncode == 0
    both = f"--adapter {pair[0]} --adapter {pair[1]} --adapter {out} --evaluate --dataset"
    assert f"{both} imdb" in told and f"{both} rotten_tomatoes" in told


def test_svd_is_the_nearest_of_that_rank(pair, tmp_path):
    combined(tmp_path / "svd", *pair, kind="svd")
    exact, ours = weighted(updates(pair[0]), updates(pair[1]), 1, 1), updates(tmp_path / "svd")
    for key in exact:
        sizes = torch.linalg.svdvals(exact[key])
        assert (ours[key] - exact[key]).norm() == pytest.approx(sizes[16:].norm().item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties"])
def test_sparse_kinds_drop_entries_and_are_repeatable(pair, tmp_path, kind):
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (1, 1, 2)):
        combined(out, *pair, kind=kind, more=("--density", "0.2", "--seed", seed))
    a, b, c = (load_file(out / WEIGHTS) for out in outs)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(a[k], c[k]) for k in a) == (kind == "ties")  # DARE draws
    entries = torch.cat([v.flatten() for v in a.values()])
    # each keeps 20%: at most 40% are left, all but 64% of both dropped where they are drawn independently
    assert 0.2 <= (entries != 0).float().mean() <= 0.41
    assert json.loads((outs[0] / NOTES).read_text())["combination"]["density"] == 0.2


def test_what_it_was_made_of_is_on_record(pair, tmp_path):
    combined(tmp_path / "sum", f"{pair[0]}:0.7", pair[1])
    notes, own = (json.loads((folder / NOTES).read_text()) for folder in (tmp_path / "sum", pair[0]))
    parents = notes["combination"]["parents"]
    assert [(p["adapter"], p["weight"]) for p in parents] == [(pair[0].name, 0.7), ("other", 1.0)]
    assert notes["prompt"] == own["prompt"] and notes["base"] == own["base"]
    # rows of each that training held out, whichever of the datasets is scored
    adapter = read_adapter(tmp_path / "sum")
    assert adapter.trained_on("imdb")["seed"] == 42 and adapter.trained_on("rotten_tomatoes")["seed"] == 7
    combined(tmp_path / "again", tmp_path / "sum", pair[0], kind="cat")
    assert read_adapter(tmp_path / "again").trained_on("rotten_tomatoes")["seed"] == 7


def test_another_prompt_and_other_seeds_are_told(pair, tmp_path):
    other = changed(
        pair[0], tmp_path / "asks", notes={"prompt": {"system": "You judge films."}, "dataset": {"seed": 7}}
    )
    told = combined(tmp_path / "sum", pair[0], other)
    assert f"asks: trained with another prompt; {pair[0].name}'s is kept" in told
    assert "imdb was split by different seeds" in told


def refused(*flags, code):
    done = here(SCRIPT, *flags)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    return done.stderr


def test_what_does_not_go_together_is_one_line(pair, tmp_path):
    def refusal(parts, kind="linear", code=1, out=tmp_path / "out"):
        told = refused("--combine", *parts, "--combination", kind, "--output-dir", out, code=code)
        assert not (tmp_path / "out").exists()
        return told

    first, second = pair
    small = changed(
        first, tmp_path / "small", {"r": 4}, matrices=lambda k, v: v[:4] if "lora_A" in k else v[:, :4]
    )
    assert "ranks are [16, 4], choose cat or svd" in refusal([first, small], code=2)
    assert "needs two adapters" in refusal([first], "ties", code=2)
    assert "there is no folder" in refusal([first, tmp_path / "nothing"], code=2)
    assert "x is no number; write FOLDER:WEIGHT" in refusal([f"{first}:x"], code=2)
    assert "nan is no number" in refusal([f"{first}:nan"], code=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "already there and not empty" in refusal([first, second], code=2, out=tmp_path / "full")
    for what, value in (("revision", "abc"), ("config_sha256", "0"), ("precision", "bf16")):
        other = changed(first, tmp_path / what, notes={"base": {what: value}})
        assert f"({what} {value})" in refusal([first, other])
    dora = changed(first, tmp_path / "dora", {"use_dora": True})
    assert "use_dora can't be added up" in refusal([first, dora])
    pattern = changed(first, tmp_path / "pattern", {"target_modules": ".*_proj"})
    assert "target_modules is a list in one adapter and a pattern" in refusal([first, pattern])
    (foreign := changed(first, tmp_path / "foreign")).joinpath(NOTES).unlink()
    assert "which base it belongs to is unknown" in refusal([first, foreign])


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--combine", "a", "b"), "--combine and --output-dir: both or none"),
        (("--output-dir", "x", "A film."), "--combine and --output-dir: both or none"),
        (("--combine", "--output-dir", "x"), "--combine: name adapters"),
        (("--combine", "a", "--output-dir", "x", "--adapter", "b"), "leave --adapter out"),
        (
            ("--combine", "a", "--output-dir", "x", "--evaluate"),
            "--evaluate and --combine: one thing at a time",
        ),
        (("--combine", "a", "b", "--output-dir", "x", "--density", "0.5"), "cat keeps all entries"),
        (
            ("--combine", "a", "--output-dir", "x", "--combination", "ties", "--density", "0"),
            "--density 0.0: must",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_told_before_anything_is_read(flags, words):
    assert words in refused(*flags, code=2)
