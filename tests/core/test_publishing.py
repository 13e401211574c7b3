"""--push-to-hub and --adapter owner/name, against a hub on this machine that HfApi really writes to."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_RUN, here, script
from hub_server import TOKEN, start

from qlora import cards, publishing
from qlora.files import broken_files

sys.path.insert(0, str(ROOT / "llama.cpp"))

REPO = "you/reviews"
PUSHED = {"adapter_config.json", "adapter_model.safetensors", "qlora.json", "complete.json", "README.md"}
PUSHED |= {"report.md", "report.json", "curves.png", "tokenizer.json", "tokenizer_config.json"}
PUSHED |= {"chat_template.jinja"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; this process and its children take it for the hub, with an empty cache and a token."""
    from huggingface_hub import constants

    server = start()
    address = f"http://127.0.0.1:{server.server_port}"
    set_here = {"ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": False}
    set_here |= {"HF_TOKEN_PATH": str(tmp_path / "no-token"), "HF_HUB_OFFLINE": False}
    set_here["HUGGINGFACE_CO_URL_TEMPLATE"] = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in set_here.items():
        monkeypatch.setattr(constants, name, value)
    env = {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "0", "NO_PROXY": "127.0.0.1"}
    for name, value in (env | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}).items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


def push(trained, *flags):
    return here("qlora_inference.py", "--adapter", trained, "--push-to-hub", REPO, *flags)


def the_error(done) -> str:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode in (1, 2) and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


def test_a_run_arrives_whole_and_private_and_no_word_of_this_machine_does(hub, trained):
    done = push(trained, "--private")
    assert done.returncode == 0, done.stderr
    there = hub.repositories[REPO]
    assert set(there.files) == PUSHED and there.private
    assert "(private)" in done.stderr and f"/{REPO} at " in done.stderr
    assert there.files["adapter_model.safetensors"] == (trained / "adapter_model.safetensors").read_bytes()
    assert f'from_pretrained(base, "{REPO}")'.encode() in there.files["README.md"]
    base = json.loads((trained / "qlora.json").read_text())["base"]["public_name"]
    for name, content in there.files.items():
        for word in (base, str(trained.parent), str(Path.home()), str(ROOT), TOKEN):
            assert word.encode() not in content, (name, word)


def test_a_second_push_changes_nothing_and_a_changed_card_alone_is_sent(hub, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    assert push(folder).returncode == 0 and not hub.repositories[REPO].private
    assert push(folder).returncode == 0 and len(hub.repositories[REPO].commits) == 1
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    assert push(folder).returncode == 0 and hub.repositories[REPO].commits[1:] == [["README.md"]]


@pytest.mark.parametrize("broken", ["commit", "large"])
def test_a_failed_upload_says_what_repeats_it_and_that_works(hub, trained, broken):
    hub.breaks.add(broken)
    said = the_error(push(trained))
    command = f"python qlora_inference.py --adapter {trained} --push-to-hub {REPO}"
    assert "the hub did not take" in said and said.endswith(f"; again: {command}"), said
    assert hub.repositories[REPO].files == {}
    hub.breaks.clear()
    assert push(trained).returncode == 0 and set(hub.repositories[REPO].files) == PUSHED


def test_a_pushed_adapter_is_fetched_pinned_and_answers_as_before(hub, trained, tiny_folder):
    hub.repositories.clear()
    assert push(trained).returncode == 0
    there = hub.repositories[REPO]
    there.files |= {
        "evil.py": b"import os",
        "pytorch_model.bin": b"pickle",
        "x/adapter_model.safetensors": b"x",
    }
    ask = (
        "qlora_inference.py",
        "--model",
        tiny_folder,
        "--max-new-tokens",
        2,
        "--lane",
        "fp32",
        "A fine film.",
    )
    done = here(*ask, "--adapter", REPO)
    assert done.returncode == 0, done.stderr
    assert f"fetched    {REPO}@{there.sha}" in done.stderr and "adapter    reviews" in done.stderr
    assert done.stdout == here(*ask, "--adapter", trained).stdout
    fetched = {path.split("/", 4)[-1] for _, path in hub.asked if "/resolve/" in path}
    assert fetched == PUSHED - {"README.md", "report.md", "report.json", "curves.png"}
    commit = there.sha
    there.commits.append(["a later push"])
    there.files["adapter_model.safetensors"] = b"other"
    assert here(*ask, "--adapter", f"{REPO}@{commit}").stdout == done.stdout  # from the cache


def test_an_adapter_of_another_tool_is_fetched_too(hub, trained, tiny_folder):
    assert push(trained).returncode == 0
    for name in ("qlora.json", "complete.json"):
        del hub.repositories[REPO].files[name]
    ask = ("--model", tiny_folder, "--max-new-tokens", 2, "--lane", "fp32", "A fine film.")
    done = here("qlora_inference.py", "--adapter", REPO, *ask)
    assert done.returncode == 0 and "reviews has no qlora.json: the prompt" in done.stderr, done.stderr


def test_a_fetched_adapter_of_another_base_is_refused(hub, trained, tmp_path, tokenizer):
    from trials.world import make_tiny

    assert push(trained).returncode == 0
    other = make_tiny(tmp_path / "other", tokenizer, intermediate_size=256)
    done = here("qlora_inference.py", "--adapter", REPO, "--model", other, "--lane", "fp32", "x")
    assert "was trained on" in the_error(done)


@pytest.mark.parametrize(
    "name, words",
    [
        ("you/nothing", "the hub has no adapter 'you/nothing'"),
        ("you/model", "is no adapter (a whole model: --adapter none --model you/model)"),
        ("you/pickles", "no adapter_model.safetensors; pickles are never fetched"),
        ("you/reviews@v9", "has no such revision"),
    ],
)
def test_what_is_no_adapter_is_one_line(hub, name, words):
    from hub_server import Repository

    for repository, file in (("model", "config.json"), ("pickles", "adapter_config.json"), ("reviews", "x")):
        hub.repositories[f"you/{repository}"] = Repository(private=False)
        hub.repositories[f"you/{repository}"].files = {file: b"{}", "adapter_model.bin": b"pickle"}
    assert words in the_error(here("qlora_inference.py", "--adapter", name, "x"))


def test_a_local_folder_of_the_name_wins(hub, trained, tmp_path, monkeypatch):
    from qlora.adapters import read_adapter

    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / REPO)
    assert read_adapter(Path(REPO)).folder == Path(REPO) and hub.asked == []


@pytest.mark.parametrize(
    "flags, change, words",
    [
        (["--push-to-hub", "reviews"], {}, "write you/name"),
        (["--private"], {}, "--private: goes with --push-to-hub"),
        (
            ["--push-to-hub", "others/reviews"],
            {},
            "the hub refuses others/reviews (You don't have the rights",
        ),
        (["--push-to-hub", REPO], {"role": "read"}, "this token may only read"),
        (["--push-to-hub", REPO], {"role": "fineGrained"}, "with a token that may write there"),
        (["--push-to-hub", REPO], {"HF_TOKEN": ""}, "no token; `hf auth login`"),
        (["--push-to-hub", REPO], {"HF_TOKEN": "hf_wrong"}, "`hf auth login` with a token"),
        (["--push-to-hub", "you/open", "--private"], {}, "is there already and public"),
    ],
)
def test_what_can_not_be_pushed_is_told_before_training(
    hub, tiny_folder, tmp_path, monkeypatch, flags, change, words
):
    from hub_server import Repository

    hub.repositories["you/open"] = Repository(private=False)
    hub.role = change.get("role", "write")
    monkeypatch.setenv("HF_TOKEN", change.get("HF_TOKEN", TOKEN))
    run = ("qlora_finetune.py", "--model", tiny_folder, "--output-dir", tmp_path / "run", *SMALL_RUN)
    assert words in the_error(here(*run, *flags))
    assert not (tmp_path / "run" / "settings.json").exists() and hub.repositories["you/open"].files == {}


def test_an_unreachable_hub(trained, monkeypatch, hub):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = the_error(push(trained))
    assert "can't be reached" in said and "cache" not in said
    said = the_error(here("qlora_inference.py", "--adapter", "you/far", "x"))
    assert "can't be reached" in said and "no folder of that name" in said


def test_the_token_is_in_no_output_and_no_file(hub, tiny_folder, tmp_path):
    """The whole way, as a user goes it: train, a push that fails, and the push of the complete run."""
    out, watched = tmp_path / "run", []
    hub.breaks.add("commit")
    flags = ("--output-dir", out, "--push-to-hub", REPO)
    done = script("qlora_finetune.py", "--model", tiny_folder, *flags, *SMALL_RUN, "--max-steps", 2)
    said = the_error(done)
    assert said.endswith(f"python qlora_finetune.py --output-dir {out} --resume --push-to-hub {REPO}")
    watched += [done.stdout, done.stderr]
    hub.breaks.clear()
    done = here("qlora_finetune.py", *flags, "--resume")
    assert done.returncode == 0 and "nothing to do" in done.stderr, done.stderr
    assert set(hub.repositories[REPO].files) == PUSHED
    watched += [done.stdout, done.stderr, *map(str, hub.repositories[REPO].files.values())]
    watched += [str(path.read_bytes()) for path in out.rglob("*") if path.is_file()]
    assert not any(TOKEN in text for text in watched)


def test_a_merged_model_and_its_card(hub, trained, tmp_path):
    merged = tmp_path / "merged"
    flags = ("--lane", "fp32", "--merge", merged, "--force", "--push-to-hub", "you/merged")
    hub.breaks.add("large")
    said = the_error(here("qlora_inference.py", "--adapter", trained, *flags))
    again = ("--adapter", "none", "--model", str(merged), "--push-to-hub", "you/merged")
    assert said.endswith("again: python qlora_inference.py " + " ".join(again))
    hub.breaks.clear()
    done = here("qlora_inference.py", *again)
    assert done.returncode == 0, done.stderr
    files = hub.repositories["you/merged"].files
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(files)
    assert b"library_name: transformers" in files["README.md"] and b"You judge" in files["README.md"]
    assert str(tmp_path).encode() not in b"".join(files.values())


def test_gguf_files(hub, trained, tmp_path, monkeypatch):
    import gguf

    import export
    import gguf_export

    out = tmp_path / "gguf"
    out.mkdir()
    written = []
    for kind, note in (("Q8_0", "data.txt"), ("f16", "data.txt"), ("bad", "/home/me/data.txt")):
        writer = gguf.GGUFWriter(out / f"run-{kind}.gguf", "llama")
        writer.add_string("quantize.imatrix.dataset", note)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        written.append(out / f"run-{kind}.gguf")
    (out / "Modelfile").write_text("FROM ./run-Q8_0.gguf\n")
    flags = ["--adapter", str(trained), "--output-dir", str(out), "--push-to-hub", "you/gguf"]
    monkeypatch.setattr(gguf_export, "make", lambda _: written[:2])
    export.main(flags)
    files = hub.repositories["you/gguf"].files
    assert set(files) == {"run-Q8_0.gguf", "run-f16.gguf", "Modelfile", "README.md"}
    assert b"llama-cli -hf you/gguf --hf-file run-Q8_0.gguf -sys" in files["README.md"]
    monkeypatch.setattr(gguf_export, "make", lambda _: written)
    with pytest.raises(publishing.UserError, match="holds a path of this machine, /home/me"):
        export.main(flags)


def test_the_card_of_a_run_on_the_hubs_model_and_data():
    from huggingface_hub import ModelCard

    scores = {"rows": 400, "tuned": {"accuracy": 0.9025}}
    front = cards.front_matter("HuggingFaceTB/SmolLM2-135M-Instruct", "imdb", scores, **cards.PEFT)
    data = ModelCard(f"{front}# Title\n").data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and data.license == "apache-2.0"
    assert data.datasets == ["stanfordnlp/imdb"] and data.library_name == "peft"
    assert data.pipeline_tag == "text-generation" and data.metrics == ["accuracy"]
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_type) == (0.9025, "stanfordnlp/imdb")
    local = ModelCard(cards.front_matter("/home/me/base", "/home/me/rows.csv", scores, **cards.PEFT)).data
    assert local.base_model is None and local.datasets is None and local.eval_results is None


def test_rows_of_an_own_file_in_a_mixture_stay_at_home():
    parts = [{"name": "imdb", "weight": 0.5}, {"name": "/srv/secret/a.csv", "sha256": "0", "weight": 0.5}]
    mixture = {"qlora.json": {"dataset": {"name": "imdb:0.5 /srv/secret/a.csv:0.5", "parts": parts}}}
    assert publishing.has_own_rows(mixture)
    assert not publishing.has_own_rows({"qlora.json": {"dataset": {"name": "imdb"}}})
    assert ("/srv/secret/a.csv", "a.csv") in publishing.hidden_words(mixture)


def test_copies_for_others_hide_paths_and_rows_of_own_files_but_no_prompt(tmp_path):
    notes = {
        "prompt": {"system": "/no_think/a/b", "user": "{text}"},
        "base": {"name": "../models/base", "public_name": "/srv/secret/models/base"},
        "dataset": {"name": "/srv/secret/rows of mine.csv", "sha256": "0"},
    }
    report = {
        "settings": {"dataset": "/srv/secret/a.csv:0.5 ./b/c.csv:0.5", "question": "/x/y/z"},
        "evaluation": {"flips": {"examples": [{"kind": "fixed", "text": "my row"}]}},
    }
    for name, document in (("qlora.json", notes), ("report.json", report)):
        (tmp_path / name).write_text(json.dumps(document))
    (tmp_path / "README.md").write_text("on /srv/secret/rows of mine.csv\n  > my row\n")
    (tmp_path / "complete.json").write_text(json.dumps({"qlora.json": "of before"}))
    (tmp_path / ".lock").write_text("")
    copies = publishing.public_copies(tmp_path, ("qlora.json", "report.json", "README.md", "complete.json"))
    public = tmp_path / "public"
    public.mkdir()
    for name, content in copies.items():
        (public / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert broken_files(public) == []
    read = json.loads((public / "qlora.json").read_text())
    assert read["prompt"] == notes["prompt"] and read["base"] == {"name": "base", "public_name": "base"}
    assert read["dataset"]["name"] == "rows of mine.csv"
    settings = json.loads((public / "report.json").read_text())["settings"]
    assert settings == {"dataset": "a.csv:0.5 c.csv:0.5", "question": "/x/y/z"}
    assert (public / "README.md").read_text() == f"on rows of mine.csv\n  > {publishing.ROW}\n"
    assert "my row" not in "".join(path.read_text() for path in public.iterdir())
