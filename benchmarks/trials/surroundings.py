"""Odd places and odd environments: names, links, pipes, permissions, locales, missing homes."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from trials.schedule import Kind
from trials.verdicts import Verdict, check_answer, check_end
from trials.world import ROOT, WEIGHTS, System, World, checkpoints, sha256_of

NAMES = (
    *(
        "a b",
        " a",
        "a ",
        "a'b",
        'a"b',
        "a\nb",
        "a\tb",
        "-a",
        "--help",
        "~",
        "$HOME",
        "`id`",
        "a;b",
        "a&b",
        "a|b",
        "*",
        "?",
    ),
    *(
        "[a]",
        "{text}",
        "%s",
        "é",
        "e\u0301",
        "名前",
        "🎬",
        "\u202eabc",
        "a\\b",
        "a:b",
        "none",
        ".hidden",
        "...",
        "a.csv",
    ),
    *(
        "training",
        "default",
        "x" * 255,
        "é" * 127,
        "🎬" * 63,
        "x" * 256,
        "é" * 128,
        "x" * 5000,
        "a/b/c/d",
        "checkpoint-1",
    ),
    *(b"\xff\xfe", b"caf\xe9", b"a\x80b", "#", "!", "a=b", "@", "a,b", "con", "nul", "\x7f", "\x1b[31mred"),
)


def plan_names(_world: World, _draw: random.Random) -> list[dict]:
    """As the output folder, the adapter, the model and the data."""
    names = [n if isinstance(n, str) else n.decode("utf-8", "surrogateescape") for n in NAMES]
    return [{"name": name, "of": what} for name in names for what in ("output", "adapter", "model", "data")]


def use_name(world: World, system: System, trial: dict) -> Verdict:
    name, what = trial["name"], trial["of"]
    with world.folder() as folder:
        try:
            return _use_name(world, system, folder, name, what)
        except OSError as error:  # the system itself does not take the name
            if what == "output":
                raise
            return Verdict(detail=f"no such name here: {error.strerror}")


def _use_name(world: World, system: System, folder: Path, name: str, what: str) -> Verdict:
    path = Path(name)  # relative to the folder, as it is typed
    if what == "output":
        done = world.call(system.train(path, cwd=folder))
        verdict = check_end(done)
        if verdict.survived and done.code == 0 and sha256_of(folder / path / WEIGHTS) != system.sha256:
            return Verdict("silently wrong", "another adapter than elsewhere")
        return verdict
    if what == "adapter":
        shutil.copytree(system.baseline, folder / path)
        return check_answer(world.call(system.answer(path, cwd=folder)), system.reference)
    if what == "model":
        shutil.copytree(world.work / "tiny", folder / path)
        return check_answer(
            world.call(system.answer(system.baseline, model=path, cwd=folder)), system.reference
        )
    path = Path(name + ".csv")
    path.parent != Path() and (folder / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(world.work / "reviews.csv", folder / path)
    done = world.call(system.train(folder / "out", data=path, cwd=folder))
    verdict = check_end(done)
    if verdict.survived and done.code == 0 and sha256_of(folder / "out" / WEIGHTS) != system.sha256:
        return Verdict("silently wrong", "another adapter than elsewhere")
    return verdict


# --- what stands in the way ---


def drop_overrides() -> None:
    """As root: obey file modes like everybody (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH are given up)."""
    if os.geteuid():
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, data)
    data[0] &= ~0b110  # effective
    libc.capset(header, data)


WAYS = (
    *("output is a file", "output is a link to a folder", "output is a dangling link", "output is a pipe"),
    *(
        "output holds other files",
        "output is read-only",
        "output's parent is read-only",
        "output can't be entered",
    ),
    *(
        "output is /dev/null",
        "output below a file",
        "the settings are read-only",
        "a checkpoint is read-only",
    ),
    *("the lock is read-only", "the lock is a folder", "the lock is a link", "report.json is a folder"),
    *("adapter_model.safetensors is a folder", "a checkpoint is a file", "checkpoint-99 is empty"),
    *("checkpoint-99 is a dangling link", "checkpoint-1000000000000", "a leftover of a killed run"),
    *(
        "a leftover is a file",
        "a leftover is a link outside",
        "settings.json is a folder",
        "settings.json is a pipe",
    ),
    *(
        "before.json is a folder",
        "complete.json is a folder",
        "the adapter can't be read",
        "the base can't be read",
    ),
    *("the data can't be read", "the adapter is a link", "files are links", "the model folder is read-only"),
)


def plan_obstacles(_world: World, _draw: random.Random) -> list[dict]:
    return [{"way": way} for way in WAYS]


def meet(world: World, system: System, trial: dict) -> Verdict:
    """Refused, or the run ends as it should; what lies outside the folder stays as it was."""
    with world.folder() as folder:
        way, out, outside = trial["way"], folder / "out", folder / "outside"
        outside.mkdir()
        (outside / "precious").write_text("precious")
        options = {"before": drop_overrides}
        try:
            job = arrange(world, system, folder, way, options)
            done = world.call(job)
        finally:
            for path in (folder, out, *folder.rglob("*")):
                if not path.is_symlink() and path.exists() and not path.is_fifo():
                    path.chmod(0o755 if path.is_dir() else 0o644)
        verdict = check_end(done)
        if not (outside / "precious").exists() or (outside / "precious").read_text() != "precious":
            return Verdict("lost", "a file outside of the run's folder")
        if verdict.survived and done.code == 0 and job.hash_logits:
            return check_answer(done, system.reference)
        if (
            verdict.survived
            and done.code == 0
            and sha256_of(
                Path(job.args[-1 if not system.ours else job.args.index("--output-dir") + 1]) / WEIGHTS
            )
            != system.sha256
        ):
            return Verdict("silently wrong", "another adapter than elsewhere")
        return verdict


def arrange(world: World, system: System, folder: Path, way: str, options: dict):
    out, outside = folder / "out", folder / "outside"
    subject, _, what = way.partition(" is ")
    if subject == "output" or way.startswith("output"):
        _arrange_output(out, outside, way)
        if way == "output is /dev/null":
            out = Path("/dev/null")
        if way == "output below a file":
            out = out / "below"
        return system.train(out, **options)
    if way in ("the adapter can't be read", "the adapter is a link", "files are links"):
        shutil.copytree(system.baseline, out)
        if way == "the adapter can't be read":
            (out / WEIGHTS).chmod(0)
        if way == "the adapter is a link":
            (folder / system.baseline.name).symlink_to(out)
            out = folder / system.baseline.name
        if way == "files are links":
            for path in list(out.iterdir()):
                if path.is_file():
                    path.rename(outside / path.name)
                    path.symlink_to(outside / path.name)
        return system.answer(out, **options)
    if way in ("the base can't be read", "the model folder is read-only"):
        shutil.copytree(world.work / "tiny", folder / "tiny")
        (folder / "tiny" / "model.safetensors").chmod(0 if "can't" in way else 0o444)
        (folder / "tiny").chmod(0o555)
        return system.answer(system.baseline, model=folder / "tiny", **options)
    if way == "the data can't be read":
        shutil.copy(world.work / "reviews.csv", folder / "data.csv")
        (folder / "data.csv").chmod(0)
        return system.train(out, data=folder / "data.csv", **options)
    shutil.copytree(system.interrupted, out)
    _arrange_inside(out, outside, way)
    return system.train(out, resume=True, **options)


def _arrange_output(out: Path, outside: Path, way: str) -> None:
    if way in ("output is a file", "output below a file"):
        out.write_text("precious")
    elif way == "output is a link to a folder":
        (outside / "empty").mkdir()
        out.symlink_to(outside / "empty")
    elif way == "output is a dangling link":
        out.symlink_to(outside / "nowhere" / "deep")
    elif way == "output is a pipe":
        os.mkfifo(out)
    elif way == "output holds other files":
        out.mkdir()
        (out / "thesis.tex").write_text("precious")
    elif way in ("output is read-only", "output can't be entered"):
        out.mkdir(mode=0o555 if "read" in way else 0o600)
    elif way == "output's parent is read-only":
        out.parent.chmod(0o555)


def _arrange_inside(out: Path, outside: Path, way: str) -> None:
    subject, _, what = way.partition(" is ")
    path = out / {
        "the settings": "settings.json",
        "the lock": ".lock",
        "a checkpoint": checkpoints(out)[0].name,
    }.get(subject.removesuffix(" are read-only"), subject)
    if "read-only" in way:
        path.exists() or path.touch()
        path.chmod(0o555 if path.is_dir() else 0o444)
    elif (
        what in ("a folder", "a pipe", "a file", "a link", "empty", "a dangling link")
        and "leftover" not in way
    ):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        makers = {"a folder": path.mkdir, "empty": path.mkdir, "a pipe": lambda: os.mkfifo(path)}
        makers |= {
            "a file": lambda: path.write_text("x"),
            "a link": lambda: path.symlink_to(outside / "precious"),
        }
        makers["a dangling link"] = lambda: path.symlink_to(outside / "nowhere")
        makers[what]()
    elif way == "checkpoint-1000000000000":
        (out / way).mkdir()
    elif way == "a leftover of a killed run":
        (out / ".qlora-part-abc").mkdir()
        (out / ".qlora-part-abc" / WEIGHTS).write_text("half")
    elif way == "a leftover is a file":
        (out / ".qlora-part-abc").write_text("half")
    elif way == "a leftover is a link outside":
        (out / ".qlora-part-abc").symlink_to(outside)


# --- environments ---

ENVIRONMENTS = (
    *({"WORLD_SIZE": v} for v in ("", "x", "0", "2", "-1", "1.0", "1" * 5000)),
    *({"RANK": v, "LOCAL_RANK": v} for v in ("", "x", "7")),
    *({"HOME": v} for v in ("", "/nowhere", "/dev/null", "/proc")),
    *({"TMPDIR": v} for v in ("", "/nowhere", "/dev/null", "relative")),
    *({"HF_HOME": v} for v in ("", "/nowhere", "/dev/null", "\udc80")),
    *({"HF_TOKEN": v} for v in ("", "hf_é", "a b", "x\ny", "x" * 100_000)),
    *({"HF_ENDPOINT": v} for v in ("", "x", "http://", "http://127.0.0.1:1", "ftp://x", "http://[::")),
    *(
        {name: v}
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY", "NO_PROXY")
        for v in ("x", "http://", "socks5://x", "http://[::", "http://a:b@x:99999")
    ),  # fmt: skip
    *(
        {name: v}
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR")
        for v in ("/nowhere", "/dev/null")
    ),  # fmt: skip
    *({"COLUMNS": v} for v in ("0", "1", "x", "100000")),
    *({"TERM": v} for v in ("", "dumb")),
    {"NO_COLOR": "1", "FORCE_COLOR": "1"},
    {"MPLBACKEND": "nowhere"},
    {"MPLCONFIGDIR": "/dev/null"},
    {"CUDA_VISIBLE_DEVICES": "x"},
    {"ACCELERATE_USE_FSDP": "true"},
    {"ACCELERATE_USE_DEEPSPEED": "true"},
    {"ACCELERATE_MIXED_PRECISION": "x"},
    {"PYTORCH_CUDA_ALLOC_CONF": "x"},
    {"OMP_NUM_THREADS": "x"},
    {"TOKENIZERS_PARALLELISM": "x"},
    {"TQDM_DISABLE": "1"},
    {"TQDM_MININTERVAL": "x"},
    {"WANDB_MODE": "x", "WANDB_API_KEY": "secret"},
    {"TRANSFORMERS_VERBOSITY": "x"},
    {"PEFT_TYPE": "x"},
)
STREAMS = ("stdin closed", "stdout closed", "stderr closed", "all closed", "ascii", "latin-1", "cp1252")


def plan_environments(_world: World, _draw: random.Random) -> list[dict]:
    trials = [{"env": env, "how": how} for env in ENVIRONMENTS for how in ("train", "answer")]
    # A model id that the hub would be asked for, where the environment matters to the hub's client.
    online = [
        e
        for e in ENVIRONMENTS
        if any(n.startswith(("HF_", "SSL", "REQ", "CURL")) or "ROXY" in n.upper() for n in e)
    ]
    trials += [{"env": env, "how": "hub", "qlora_only": True} for env in online]
    return trials + [{"streams": s, "how": how} for s in STREAMS for how in ("train", "answer")]


def use_environment(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        options: dict = {"cwd": folder, "env": trial.get("env")}
        streams = trial.get("streams", "")
        if "closed" in streams:
            numbers = {"stdin": (0,), "stdout": (1,), "stderr": (2,), "all": (0, 1, 2)}[streams.split()[0]]
            options["closed"] = numbers
        elif streams:
            options["encoding"] = streams
        if trial["how"] == "hub":
            job = system.answer("none", model="nobody/nothing", before=go_online, **options)
        elif trial["how"] == "train":
            job = system.train(folder / "out", **options)
        else:
            job = system.answer(system.baseline, **options)
        done = world.call(job)
        silent = done.code in (0, 1) and ("stderr" in streams or "all" in streams)
        verdict = Verdict() if silent and not done.traceback else check_end(done)
        if not verdict.survived or done.code:
            return verdict
        if trial["how"] == "train" and sha256_of(folder / "out" / WEIGHTS) != system.sha256:
            return Verdict("silently wrong", "another adapter than elsewhere")
        if trial["how"] == "answer" and done.logits != system.reference.logits:
            return Verdict("silently wrong", "other logits than elsewhere")
        return verdict


def go_online() -> None:
    """In the child: what huggingface_hub read when it was imported, read again."""
    import huggingface_hub.constants as constants
    from huggingface_hub import hf_api

    constants.HF_HUB_OFFLINE = False
    constants.ENDPOINT = os.environ.get("HF_ENDPOINT") or "http://127.0.0.1:9"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    hf_api.api.endpoint = constants.ENDPOINT
    if home := os.environ.get("HF_HOME"):
        for name, value in vars(constants).copy().items():  # the paths below the home of the first process
            if isinstance(value, str) and value.startswith(constants.HF_HOME + "/"):
                setattr(constants, name, home + value.removeprefix(constants.HF_HOME))
        constants.HF_HOME = home


REAL = (
    *({"LC_ALL": v} for v in ("C", "POSIX", "nowhere", "C.UTF-8")),
    *(
        {"PYTHONOPTIMIZE": "2"},
        {"PYTHONWARNINGS": "error"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONUTF8": "0"},
    ),
    *(
        {"HOME": ""},
        {"TMPDIR": "/nowhere"},
        {"HF_ENDPOINT": "x"},
        {"WORLD_SIZE": ""},
        {"PYTHONHASHSEED": "5"},
    ),
)


def plan_real(_world: World, _draw: random.Random) -> list[dict]:
    """What Python itself reads when it starts: real processes."""
    return [{"env": env, "flags": ["--help"] if i % 2 else ["--samples", "é"]} for i, env in enumerate(REAL)]


def use_real(_world: World, _system: System, trial: dict) -> Verdict:
    command = [sys.executable, str(ROOT / "qlora_finetune.py"), *trial["flags"]]
    env = {**os.environ, **trial["env"]}
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=120
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if "Traceback" in out + err:
        return Verdict("traceback", err.strip().splitlines()[-1])
    lines = [line for line in err.splitlines() if line.strip()]
    helped = trial["flags"] == ["--help"] and done.returncode == 0 and "--samples" in out
    refused = done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    refused = refused and "╭" not in err and "Parsing" not in err
    return Verdict() if helped or refused else Verdict("other", f"exit code {done.returncode}: {err[-300:]}")


KINDS = (
    Kind(
        "odd names",
        "spaces, quotes, line breaks, 255 bytes and more, not UTF-8: of output, adapter, model and data",
        plan_names,
        use_name,
        plain=20,
    ),
    Kind(
        "obstacles",
        "files, links, pipes, modes where folders should be; nothing outside of the run's folder may change",
        plan_obstacles,
        meet,
        plain=10,
    ),
    Kind(
        "odd environments",
        "WORLD_SIZE, HOME, TMPDIR, HF_*, proxies, certificates, closed streams, other encodings",
        plan_environments,
        use_environment,
        plain=20,
    ),
    Kind(
        "odd environments of Python",
        "LC_ALL, PYTHONOPTIMIZE, … in real processes",
        plan_real,
        use_real,
        long=True,
    ),
)
