"""Processes that are killed, interrupted, or in each other's way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from trials.schedule import Kind
from trials.verdicts import Verdict, check_answer, check_end
from trials.world import ROOT, WEIGHTS, System, World, sha256_of

STOPPED = (0, 1, 2, 130)  # exit codes of a run that was asked to stop


def plan_kills(_, draw: random.Random) -> list[dict]:
    """Shares of a run's time; some runs are killed again when they are resumed."""
    return [
        {"at": [round(draw.uniform(0.02, 1.05), 4) for _ in range(draw.choice((1, 1, 2, 3)))]}
        for _ in range(150)
    ]


def kill(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        out = folder / "out"
        for number, share in enumerate(trial["at"]):
            process = world.start(system.train(out, resume=number > 0))
            process.sleep_until(share * system.seconds)
            process.send(signal.SIGKILL)
            process.wait()
        return world.check_resumed(system, out)


def plan_signals(_, draw: random.Random) -> list[dict]:
    def one() -> dict:
        at = round(draw.uniform(0.0, 1.05), 4)
        return {
            "signal": draw.choice(("SIGINT", "SIGTERM")),
            "at": at,
            "again": draw.choice((None, None, 0.01, 0.2)),
        }

    return [one() for _ in range(130)]


def stop(world: World, system: System, trial: dict) -> Verdict:
    """Ctrl-C or SIGTERM, some of them twice: no traceback, and the run goes on."""
    number = getattr(signal, trial["signal"])
    with world.folder() as folder:
        out = folder / "out"
        process = world.start(system.train(out))
        process.sleep_until(trial["at"] * system.seconds)
        process.send(number)
        if trial["again"]:
            time.sleep(trial["again"])
            process.send(number)
        done = process.wait()
        # Before a script's first line nothing catches SIGTERM, and nothing has to.
        begun = system.ours and out.exists()
        verdict = check_end(done, STOPPED if begun else (*STOPPED, -number))
        return world.check_resumed(system, out) if verdict.survived else verdict


def plan_starts(_, draw: random.Random) -> list[dict]:
    names = ("qlora_finetune.py", "qlora_inference.py", "quant_llama32_4bit_lora.py")
    return [{"script": names[i % 3], "at": round(draw.uniform(0.02, 2.0), 3)} for i in range(12)]


def stop_start(world: World, _system: System, trial: dict) -> Verdict:
    """Ctrl-C while Python still imports: of a real process, since a fork has imported everything."""
    with world.folder() as folder:
        flags = {"qlora_finetune.py": ["--model", world.work / "tiny", "--output-dir", folder / "out"]}
        flags["qlora_inference.py"] = ["--adapter", world.qlora.baseline, "Good?"]
        flags["quant_llama32_4bit_lora.py"] = ["--model", world.work / "tiny", "--output-dir", folder / "out"]
        command = [sys.executable, str(ROOT / trial["script"]), *map(str, flags[trial["script"]])]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A shell starts what runs in the background with Ctrl-C ignored, and children inherit that.
        heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, start_new_session=True, preexec_fn=heed, **pipes
        )
        time.sleep(trial["at"])
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Verdict("hang", "60 s after Ctrl-C")
        if "Traceback" in err:
            return Verdict("traceback", err.strip().splitlines()[-1])
        # Before the first line of ours Python itself ends by the signal.
        fine = process.returncode in (0, 130, -signal.SIGINT)
        return Verdict() if fine else Verdict("other", f"exit code {process.returncode}: {err[-300:]}")


def plan_races(_, draw: random.Random) -> list[dict]:
    trials = [
        {"what": "two runs", "apart": round(draw.choice((0.0, draw.uniform(0, 0.8))), 3)} for _ in range(24)
    ]
    trials += [{"what": "run and --resume", "apart": round(draw.uniform(0, 0.8), 3)} for _ in range(8)]
    trials += [{"what": "two --resume of a killed run", "apart": 0.0} for _ in range(8)]
    trials += [
        {"what": "two merges", "apart": round(draw.uniform(0, 0.2), 3), "qlora_only": True} for _ in range(12)
    ]
    trials += [{"what": "answer while it trains", "apart": round(draw.uniform(0, 1.0), 3)} for _ in range(12)]
    return trials


def race(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        if trial["what"] == "two merges":
            return race_merges(world, system, folder, trial["apart"])
        out = folder / "out"
        if trial["what"] == "two --resume of a killed run":
            subprocess.run(["cp", "-r", system.interrupted, out], check=True)
        first = world.start(system.train(out, resume="two --resume" in trial["what"]))
        time.sleep(trial["apart"] * system.seconds)
        if trial["what"] == "answer while it trains":
            second = world.start(system.answer(out))
        else:
            second = world.start(system.train(out, resume="resume" in trial["what"]))
        ends = [first.wait(), second.wait()]
        for done in ends:
            verdict = check_end(done)
            if not verdict.survived:
                return verdict
        if ends[0].code != 0 and ends[1].code != 0:
            return Verdict("other", f"both refused: {ends[0].last_line} / {ends[1].last_line}")
        if trial["what"] == "answer while it trains" and ends[1].code == 0:
            verdict = check_answer(ends[1], system.reference)
            if not verdict.survived:
                return verdict
        if not (out / WEIGHTS).exists() or sha256_of(out / WEIGHTS) != system.sha256:
            return Verdict("silently wrong", "two at once made another adapter than one alone")
        return world.check_resumed(system, out)


def race_merges(world: World, system: System, folder: Path, apart: float) -> Verdict:
    """Two --merge into one new folder: a whole model must come of it, whoever wins."""
    out, weights = folder / "merged", "model.safetensors"
    job = system.answer(system.baseline)
    job.args = ["--adapter", system.baseline, "--merge", out]
    alone = folder / "alone"
    single = system.answer(system.baseline)
    single.args = ["--adapter", system.baseline, "--merge", alone]
    done = world.call(single)
    if done.code:
        return Verdict("other", f"--merge alone: {done.last_line}")
    first = world.start(job)
    time.sleep(apart)
    second = world.start(job)
    for done in (first.wait(), second.wait()):
        verdict = check_end(done)
        if not verdict.survived:
            return verdict
    if not (out / weights).exists() or sha256_of(out / weights) != sha256_of(alone / weights):
        return Verdict("silently wrong", "two merges at once gave another model than one alone")
    left = [name for name in os.listdir(folder) if name.startswith(".")]
    return Verdict("other", f"left over: {left[0]}") if left else Verdict()


KINDS = (
    Kind("kill at random moments", "SIGKILL, one to three times; then --resume", plan_kills, kill, plain=40),
    Kind(
        "Ctrl-C and SIGTERM at random moments",
        "once, or twice 10 or 200 ms apart; then --resume",
        plan_signals,
        stop,
        plain=30,
    ),
    Kind(
        "Ctrl-C while it starts",
        "in the first two seconds of a real process",
        plan_starts,
        stop_start,
        long=True,
    ),
    Kind(
        "two at once",
        "two runs in one folder, run and --resume, two --resume, two --merge, inference while it trains",
        plan_races,
        race,
        plain=16,
    ),
)
