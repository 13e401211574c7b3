"""Makes course.html and course.pdf in docs/slides/build from course.md (make slides).

    python docs/slides/build.py                  # both; without Chromium the HTML alone, and a line about it
    python docs/slides/build.py --out DIR        # elsewhere

Needs Node.js 18 or newer. The first time `npm ci` fetches marp-cli, pinned in package-lock.json; from then on
no network is used. The HTML is one file with all its pictures, so it can be copied and shown offline: p opens
the presenter's notes, f the full screen. Comments in course.md become these notes; those that mark figures
(benchmarks/figures.py) are taken out first.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import mimetypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
MARP = HERE / "node_modules" / ".bin" / "marp"
MARKER = r"<!--(?:block|table|flags)\b.*?-->\n|<!--/?(?:fig|block|table|flags)\b.*?-->"
PICTURE = r"(!\[[^\]]*\]\()([^)\s]+)(\))"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def stripped(text: str) -> str:
    """'It is <!--fig a.json b text-->4<!--/fig--> bits' -> 'It is 4 bits'"""
    return re.sub(MARKER, "", text, flags=re.S)


def pictures(text: str) -> list[Path]:
    """Every picture that the slides name, once, in their order."""
    return [HERE / name for name in dict.fromkeys(path for _, path, _ in re.findall(PICTURE, text))]


def address(picture: Path, folder: Path) -> str:
    """Where a picture lies, seen from `folder`; Marp takes no file:// addresses."""
    return quote(Path(os.path.relpath(picture, folder)).as_posix())


def moved(text: str, folder: Path) -> str:
    """The slides as they can lie in `folder`."""
    return re.sub(PICTURE, lambda m: f"{m[1]}{address(HERE / m[2], folder)}{m[3]}", text)


def inlined(page: str, files: list[Path], folder: Path) -> str:
    """The HTML with its pictures inside: `src="../a.svg"` becomes `src="data:image/svg+xml;…"`."""
    for file in files:
        kind = mimetypes.guess_type(file.name)[0]
        data = base64.b64encode(file.read_bytes()).decode()
        page = page.replace(f'"{address(file, folder)}"', f'"data:{kind};base64,{data}"')
    return page


def install() -> None:
    """Fetch marp-cli where it is missing or another than the pinned one."""
    for program in ("node", "npm"):
        if not shutil.which(program):
            sys.exit(
                f"error: {program} is not on PATH: the slides need Node.js 18 or newer (apt install npm)"
            )
    pinned, installed = HERE / "package-lock.json", HERE / "node_modules" / "installed-lock.json"
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
    with pinned.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two tests, or two builds, at once
        if installed.exists() and installed.read_bytes() == pinned.read_bytes():
            return
        if subprocess.run(command, cwd=HERE, stdout=sys.stderr).returncode:
            sys.exit("error: `npm ci` failed (above): is a registry reachable? It is needed this once")
        shutil.copy(pinned, installed)


def browser() -> str | None:
    """Chromium or Chrome: $CHROME_PATH, or what is on PATH."""
    return os.environ.get("CHROME_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)


def marp(source: Path, out: Path, *flags: str) -> None:
    """One conversion; --no-stdin: else marp waits for a text where it has no terminal."""
    environment = dict(os.environ)
    if os.geteuid() == 0:
        environment["CHROME_NO_SANDBOX"] = "1"  # Chromium refuses to start as root with it
    command = [MARP, "--no-stdin", "--config-file", HERE / "marp.config.json", source, "--output", out]
    found = subprocess.run([*command, *flags], env=environment, text=True, capture_output=True)
    if found.returncode or not out.exists():
        sys.exit(f"error: marp made no {out.name}:\n{found.stderr.strip()}")


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", type=Path, default=HERE / "build", help="folder of the two files")
    folder = flags.parse_args(argv).out.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        flags.error(f"--out {folder}: no folder can be made there ({error.strerror})")
    install()
    text = (HERE / "course.md").read_text()
    source, page = folder / "course.md", folder / "course.html"
    source.write_text(moved(stripped(text), folder))
    marp(source, page)
    page.write_text(inlined(page.read_text(), pictures(text), folder))
    print(page)
    if chromium := browser():
        pdf = folder / "course.pdf"
        marp(source, pdf, "--pdf", "--pdf-outlines", "--allow-local-files", "--browser-path", chromium)
        print(pdf)
    else:
        print(
            "note: no PDF: Chromium is not on PATH (apt install chromium, or set CHROME_PATH)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
