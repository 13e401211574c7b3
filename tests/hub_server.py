"""A hub on this machine that can be written to: accounts, repositories, commits and large files, in memory.

It answers what HfApi.create_repo, create_commit and snapshot_download ask, as the real one does.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

OWNER, TOKEN = "you", "hf_SECRETsecretSECRET"


class Repository:
    def __init__(self, private: bool):
        self.private, self.files, self.commits = private, {}, []

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """State is the server's: `repositories`, `large` {sha256: content}, `breaks` (what fails), `role`,
    `asked`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.handle_it(b"")

    do_HEAD = do_GET

    def do_POST(self):
        self.handle_it(self.rfile.read(int(self.headers["Content-Length"])))

    def do_PUT(self):
        length = self.headers["Content-Length"]
        content = self.rfile.read(int(length)) if length else b"".join(self.chunks())
        if "large" in self.server.breaks:
            return self.reply(400, {}, {"X-Error-Message": "the storage refused it"})
        oid = self.path.rsplit("/", 1)[-1]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.large[oid] = content
        self.reply(200, {})

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def handle_it(self, body: bytes):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append((self.command, path))
        self.known = self.headers["Authorization"] == f"Bearer {TOKEN}"
        if path == "api/whoami-v2":
            account = {"name": OWNER, "auth": {"accessToken": {"role": self.server.role}}}
            return self.reply(200, account) if self.known else self.refuse(401, "Invalid credentials")
        if path == "api/repos/create":
            return self.create(json.loads(body))
        if path == "api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        name = re.match(r"(?:api/models/)?([^/]+/[^/.]+)", path)[1]
        repository = self.server.repositories.get(name)
        if repository is None or repository.private and not self.known:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        self.answer(name, repository, path, body)

    def create(self, asked: dict):
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != OWNER or not self.known:
            return self.refuse(403, f"You don't have the rights to create a model under {name}")
        if name in self.server.repositories:
            return self.reply(409, {"error": "exists", "url": self.url(name)})
        self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        self.reply(200, {"url": self.url(name)})

    def validate(self, card: str):
        """Front matter that is YAML; base_model and datasets are hub ids, a table of results is whole."""
        errors = []
        try:
            about = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])
            for name in [about.get("base_model", "a/b"), *about.get("datasets", [])]:
                if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                    errors.append({"message": f"{name} is no hub id"})
        except (yaml.YAMLError, TypeError, AttributeError) as error:
            errors.append({"message": str(error)})
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def answer(self, name: str, repository: Repository, path: str, body: bytes):
        rest = path.split(f"{name}", 1)[1].strip("/")
        files = repository.files
        if self.command == "POST" and (not self.known or self.server.role == "fineGrained"):
            return self.refuse(403, "This token may not write here")
        if rest.startswith("preupload"):
            asked = json.loads(body)["files"]
            return self.reply(200, {"files": [self.way(file, files) for file in asked]})
        if rest.startswith(".git/info/lfs"):
            return self.reply(
                200, {"transfer": "basic", "objects": list(map(self.place, json.loads(body)["objects"]))}
            )
        if rest.startswith("commit"):
            return self.commit(name, repository, [json.loads(line) for line in body.splitlines()])
        if rest.startswith("tree"):
            listed = [
                {"type": "file", "path": p, "size": len(c), "oid": git_oid(c)} for p, c in files.items()
            ]
            return self.reply(200, listed)
        if rest.startswith("resolve"):
            _, commit, file = rest.split("/", 2)
            if file not in files:
                return self.refuse(404, "Entry not found", "EntryNotFound")
            names = {"ETag": f'"{git_oid(files[file])}"', "X-Repo-Commit": commit}
            return self.reply(200, files[file], names)
        if "revision" in rest and rest.split("/")[-1] not in ("main", repository.sha):
            return self.refuse(404, "Revision not found", "RevisionNotFound")
        self.reply(200, {"id": name, "sha": repository.sha, "private": repository.private, "siblings": []})

    def way(self, file: dict, there: dict) -> dict:
        large = file["path"].endswith((".safetensors", ".gguf", ".png", "tokenizer.json"))
        oid = there.get(file["path"]) and (sha256 if large else git_oid)(there[file["path"]])
        way = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": way, "shouldIgnore": False, "oid": oid}

    def place(self, wanted: dict) -> dict:
        if wanted["oid"] in self.server.large:
            return wanted
        return wanted | {"actions": {"upload": {"href": self.url(f"large/{wanted['oid']}")}}}

    def commit(self, name: str, repository: Repository, lines: list[dict]):
        if "commit" in self.server.breaks:
            return self.refuse(500, "the disk of the hub is full")
        for line in lines[1:]:
            value = line["value"]
            small = line["key"] == "file"
            content = base64.b64decode(value["content"]) if small else self.server.large[value["oid"]]
            repository.files[value["path"]] = content
        repository.commits.append([line["value"].get("path") for line in lines[1:]])
        self.reply(200, {"commitUrl": self.url(name), "commitOid": repository.sha})

    def url(self, path: str) -> str:
        return f"http://{self.headers['Host']}/{path}"

    def refuse(self, status: int, message: str, code: str = ""):
        self.reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def reply(self, status: int, body, headers: dict | None = None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def start() -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.repositories, server.large, server.asked = {}, {}, []
    server.breaks, server.role = set(), "write"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
