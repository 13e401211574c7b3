"""The Hugging Face hub: snapshots and adapters without pickles, and its errors in plain words."""

import contextlib
import errno
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from config import BUNDLED, MODELS, UNGATED
from qlora.cli import UserError, first_line, note
from qlora.fetch import hide_passwords

# Weights as safetensors only: unpickling a .bin runs whatever code its author put there.
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model"]
WANTED += ["merges.txt", "vocab*"]
UNWANTED = ["original/*", "consolidated*", "onnx/*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.h5"]
# Of an adapter: what is read, and what may be shown. No patterns: a repository can hold anything beside them.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")
TOKENIZER_FILES += ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "qlora.json", "complete.json")
ADAPTER_FILES += TOKENIZER_FILES
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
ADAPTER_ID = re.compile(REPOSITORY.pattern + r"(@\w[\w./-]*)?")  # with a revision, or without
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE)
# What huggingface_hub and httpx raise where nothing answers.
UNREACHABLE = {"LocalEntryNotFoundError", "ConnectionError", "HTTPError"}
LISTS = re.compile("/api/(?!resolve-cache/)")  # addresses of what the client reads into memory
LARGEST_LIST, LONGEST_WAIT = 50 << 20, 30  # bytes, seconds
LONGEST_WRITE = 300  # seconds that the hub may think about an upload: it looks into the files
INSTEAD = {
    "model": f"; without the hub: --model {BUNDLED}",
    "dataset": "; without the hub: --dataset imdb",
    "adapter": "; there is no folder of that name here either",
}


class GatedError(UserError):
    """The hub refuses this account, or none, a model whose licence has to be accepted first."""


def snapshot(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """(folder, commit) of a hub model's config, tokenizer and safetensors; UserError says the way out."""
    patterns = {"allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    with asking(hub_id, "model"):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(hub_id, revision=revision, **patterns))
    if not (folder / "config.json").is_file():
        raise UserError(f"the hub's {hub_id} has no config.json: it is no model for transformers")
    return folder, folder.name  # the cache names a snapshot's folder by its commit


def adapter(name: str) -> Path:
    """The folder of an adapter of the hub, owner/name or owner/name@revision; its commit is printed."""
    hub_id, _, revision = name.partition("@")
    with asking(hub_id, "adapter"):
        from huggingface_hub import snapshot_download

        patterns = {"allow_patterns": list(ADAPTER_FILES)}
        folder = Path(snapshot_download(hub_id, revision=revision or None, **patterns))
    if not (folder / ADAPTER_FILES[0]).is_file():
        whole = f"a whole model: --adapter none --model {hub_id}"
        raise UserError(f"the hub's {hub_id} has no {ADAPTER_FILES[0]}: it is no adapter ({whole})")
    if not (folder / ADAPTER_FILES[1]).is_file():
        raise UserError(f"the hub's {hub_id} has no {ADAPTER_FILES[1]}; pickles are never fetched")
    note(f"fetched    {hub_id}@{folder.name}")
    return folder


def name_of(folder: Path) -> str:
    """'…/models--you--reviews/snapshots/0123…' -> 'reviews'; of other folders their own name."""
    whole = folder.resolve()
    if whole.parent.name == "snapshots" and whole.parents[1].name.startswith("models--"):
        return whole.parents[1].name.split("--")[-1]
    return whole.name


def config_file(hub_id: str) -> Path:
    """A hub model's config.json alone, for planning without weights; UserError says the way out."""
    with asking(hub_id, "model"):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(hub_id, "config.json"))


def gguf_file(hub_id: str, name: str, revision: str | None) -> tuple[Path, str]:
    """(file, commit) of one GGUF file of a hub repository, and nothing else of it.

    UserError where there is none, with the names of those that are there.
    """
    with asking(hub_id, "model"):
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            path = Path(hf_hub_download(hub_id, name, revision=revision))
        except RemoteEntryNotFoundError:
            path, files = None, HfApi().list_repo_files(hub_id, revision=revision)
    if path is None:
        there = sorted(file for file in files if file.lower().endswith(".gguf"))
        more = f" and {len(there) - 12} more" if len(there) > 12 else ""
        found = f"there are {', '.join(there[:12])}{more}" if there else "it has no .gguf file at all"
        raise UserError(f"the hub's {hub_id} has no file {name}: {found}")
    return path, path.parents[len(Path(name).parts) - 1].name  # the cache: snapshots/COMMIT/NAME


def or_ungated(preset: str, why: str) -> tuple[str, str]:
    """(preset, why) of a model that was not asked for by name: an ungated one if the hub refuses `preset`."""
    if preset not in UNGATED or not is_refused(MODELS[preset]):
        return preset, why
    other, gated = UNGATED[preset], MODELS[preset]
    note(f"note       {gated} is gated and this account has no access: {MODELS[other]} instead")
    note(f"           (access: ask at https://huggingface.co/{gated}, then `hf auth login`)")
    return other, f"ungated; {preset} is not"


def is_refused(hub_id: str) -> bool:
    """Whether the hub refuses this account (or none) a gated model; raises UserError for other reasons."""
    try:
        config_file(hub_id)
    except GatedError:
        return True
    return False


@contextlib.contextmanager
def asking(name: str, kind: str) -> Iterator[None]:
    """The block asks the hub for a model, dataset, adapter or (to write) repository: with limits, and
    errors become UserErrors.

    Imports of huggingface_hub belong into it: they fail where HF_ENDPOINT is no address.
    """
    try:
        from huggingface_hub import set_client_factory

        set_client_factory(careful_client)
        yield
    except UserError:
        raise
    except Exception as error:  # the client's own kinds, httpx's and OSError
        raise explain(error, name, kind) from None


def careful_client():
    """The client of huggingface_hub 2.4, with what it lacks.

    It waits for lists without a limit, and makes file names of ETags and commits whatever they are: those of
    a hostile mirror led out of the cache.
    """
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.event_hooks["request"].append(limit_waiting)
    client.event_hooks["response"].append(check_answer)
    return client


def limit_waiting(request) -> None:
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    most = LONGEST_WRITE if request.method in ("POST", "PUT") else HF_HUB_DOWNLOAD_TIMEOUT
    waits = request.extensions["timeout"]  # seconds to connect, between two parts of the answer, …
    request.extensions["timeout"] = {k: most if v is None else v for k, v in waits.items()}


def check_answer(response) -> None:
    """Raises httpx2.RequestError where a list does not end, or a path would become the name of a file."""
    import httpx2

    names = []
    if response.request.method == "HEAD":
        names = [response.headers.get(name, "").removeprefix("W/") for name in ("etag", "x-linked-etag")]
    elif LISTS.search(response.request.url.path):
        with contextlib.closing(response.stream) as stream:
            response.stream = httpx2.ByteStream(b"".join(limited(stream)))
        response.read()
        with contextlib.suppress(ValueError, AttributeError, RecursionError):  # the client will say more
            names = [str(response.json().get("sha", ""))]
    for name in names:
        if re.search(r"[/\\]|\.\.", name):
            raise httpx2.RequestError(f"the hub sent a path as a file's name, {name[:80]}")


def limited(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The parts of a list, as long as they are not too many and do not take too long."""
    import httpx2

    size, end = 0, time.monotonic() + LONGEST_WAIT
    for part in parts:
        size += len(part)
        if size > LARGEST_LIST or time.monotonic() > end:
            raise httpx2.RequestError("the hub's answer does not end")
        yield part


def explain(error: Exception, name: str, kind: str) -> UserError:
    """A UserError for what the hub's client raised; re-raises what the disk says."""
    causes, cause = [], error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    statuses = {getattr(getattr(cause, "response", None), "status_code", None) for cause in causes}
    missing = "DatasetNotFoundError" in kinds  # of `datasets`, for gated ones too
    gated = "GatedRepoError" in kinds or missing and "gated" in str(error)
    if gated:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        what = f"{name} is gated: ask for access at {page}, then `hf auth login`"
    elif "RepositoryNotFoundError" in kinds or missing:
        presets = f"; presets: {', '.join(MODELS)}" if kind == "model" else ""
        what = f"the hub has no {kind} '{name}' (or it is private and no token is set){presets}"
    elif "RevisionNotFoundError" in kinds:
        what = f"the hub's {name} has no such revision"
    elif kind == "repository" and statuses & {401, 403}:
        what = (
            f"the hub refuses {name} ({answered(causes)}): `hf auth login` with a token that may write there"
        )
    elif statuses & {401, 403}:
        what = f"the hub refuses this token for {name}: `hf auth login` again, or unset HF_TOKEN"
    elif "HFValidationError" in kinds:
        what = f"'{name}' is neither a file or folder here nor a hub id (owner/name)"
    elif kinds & {"UnicodeEncodeError", "LocalProtocolError"}:
        what = "the Hugging Face hub can't be asked: the token (HF_TOKEN, `hf auth login`) has odd characters"
    elif kind == "repository" and (statuses - {None} or kinds & {"ValueError", "KeyError", "RuntimeError"}):
        what = f"the hub did not take {name} ({answered(causes)})"
    elif kinds & UNREACHABLE:
        cached = f"; {name} is not in the cache" if kind != "repository" else ""
        what = f"the Hugging Face hub can't be reached ({told(causes[-1])}){cached}"
    elif isinstance(error, (MemoryError, OSError)) and getattr(error, "errno", None) in DISK:
        raise error
    elif kind == "dataset":  # one without data files, with several configurations, with a script, …
        what = f"--dataset {name} can't be loaded ({told(error)})"
    else:  # an address, a token, a proxy or a certificate file that the client can't use
        # httpx quotes what it takes for a port, which can be half a password.
        why = type(error).__name__ + (f": {told(error)}" if "InvalidURL" not in kinds else "")
        settings = "HF_ENDPOINT, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE"
        what = f"the Hugging Face hub can't be asked ({why}); check {settings}"
    error = GatedError if gated else UserError
    return error(what + INSTEAD.get(kind, ""))


def answered(causes: list[BaseException]) -> str:
    """What the hub itself said, else what its client says; in one line."""
    said = [text for cause in causes if (text := getattr(cause, "server_message", None))]
    return told(Exception(" ".join((said or [str(causes[0])])[0].split())))


def told(error: BaseException) -> str:
    """The first line of its message, without passwords in addresses and the hub's token."""
    text = str(error) or type(error).__name__
    with contextlib.suppress(Exception):  # a token that can't be read can't be shown
        from huggingface_hub import get_token

        text = text.replace(get_token() or "\0", "…")
    return first_line(Exception(hide_passwords(text)))
