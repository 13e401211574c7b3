"""How long does the playground let one wait? From the click to the first token of both answers, over HTTP.

    python benchmarks/first_token.py   # about two minutes on two slow cores; writes results/playground.json
    python benchmarks/first_token.py --adapter none --rounds 2 --out /tmp/playground.json
    python benchmarks/first_token.py --picture docs/playground.png   # only the page's picture, by Chromium

Starts `python playground.py` as a user would, and asks as its page does. Three reviews, the longest as long
as the adapter reads; every one is another text, so that nothing can be kept from the one before.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OUT = ROOT / "benchmarks" / "results" / "playground.json"
TARGET_SECONDS = 2.0
SENTENCE = "The plot is thin, but the actors are wonderful and I left the cinema with a smile. "
REVIEWS = {"one sentence": 1, "six sentences": 6, "forty sentences": 40}
LENGTH = 24  # tokens of an answer


def start(adapter: str) -> tuple[subprocess.Popen, str, float]:
    """(process, address, seconds until the page can be opened)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "playground.py", "--port", str(port), "--adapter", adapter]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if line.startswith("open "):
            return process, f"http://127.0.0.1:{port}", time.perf_counter() - started
    sys.exit(f"error: playground.py ended with {process.wait()}")


def answer(url: str, text: str, name: str | None, precision: str) -> dict:
    """Seconds from the click to the first token and to the end, and the rate that the page shows."""
    greedy = [False, 1, 1, 0]
    started, first, last, found = time.perf_counter(), 0.0, [], []
    given = {"data": [text, False, name, precision, LENGTH, *greedy]}
    event = requests.post(f"{url}/gradio_api/call/answer", json=given, timeout=60).json()["event_id"]
    with requests.get(f"{url}/gradio_api/call/answer/{event}", stream=True, timeout=60) as stream:
        for line in stream.iter_lines(chunk_size=1):
            if line.startswith(b"data: [") and (found := json.loads(line[6:])):
                first = first or time.perf_counter() - started
                last = [value for value in found if isinstance(value, str) and "first token" in value] or last
            elif line.startswith(b"event: error"):
                sys.exit(f"error: the page could not answer: {line.decode()}")
    rate = re.search(r"then ([\d.]+) tokens", last[0]) if last else None
    row = {"first_token_seconds": first, "seconds": time.perf_counter() - started, "base": found[0]}
    return row | {"tokens_per_second": float(rate[1]) if rate else None}


def measure(url: str, name: str | None, precision: str, rounds: int) -> dict:
    found: dict = {what: [] for what in REVIEWS}
    for i in range(rounds):
        for what, sentences in REVIEWS.items():
            text = f"Review number {i} of a film. " + SENTENCE * sentences
            found[what].append(answer(url, text, name, precision))
            print(what, found[what][-1], flush=True)
    rows = {}
    for what, runs in found.items():
        firsts = [run["first_token_seconds"] for run in runs]
        rows[what] = {"median": statistics.median(firsts), "worst": max(firsts), "runs": runs}
    return rows


def draw(url: str, path: Path) -> None:
    """The page after one review, as large as it is in a browser of 1280 x 800."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(url)
        page.locator("#text textarea").fill(SENTENCE.strip())
        page.locator("#answer").click()
        page.get_by_text("tokens a second").wait_for()
        page.locator("#temperature input[type=range]").fill("1.5")
        page.wait_for_timeout(12_000)  # both answers end, the slider's answer is drawn
        page.screenshot(path=path, full_page=True)
        browser.close()
    print(f"written {path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--adapter", default="qlora-out", help="a folder, or none")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--out", type=Path, default=OUT)
    flags.add_argument("--picture", type=Path, help="draw the page into this file, and measure nothing")
    given = flags.parse_args()
    process, url, seconds = start(given.adapter)
    try:
        if given.picture:
            return draw(url, given.picture)
        parts = requests.get(f"{url}/config", timeout=60).json()["components"]
        menus = [part["props"] for part in parts if part["type"] == "dropdown"]
        values = {menu["label"]: menu["value"] for menu in menus}
        name = None if given.adapter == "none" else values["Adapter"] or sys.exit("error: no adapter")
        rows = measure(url, name, values["Base in"], given.rounds)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    from qlora.hardware import detect, environment  # torch would have taken a core from the server

    worst = max(row["worst"] for row in rows.values())
    record = {
        "adapter": Path(given.adapter).name,
        "precision": values["Base in"],
        "seconds_to_open": seconds,
        "new_tokens": LENGTH,
        "reviews": rows,
        "worst_first_token_seconds": worst,
        "target_seconds": TARGET_SECONDS,
        "met": worst <= TARGET_SECONDS,
        "tokens_per_second": statistics.median(
            run["tokens_per_second"]
            for row in rows.values()
            for run in row["runs"]
            if run["tokens_per_second"]
        ),
        "environment": environment(detect()),
    }
    given.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"worst first token {worst:.2f} s (target {TARGET_SECONDS}); written {given.out}")


if __name__ == "__main__":
    main()
