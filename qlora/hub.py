"""The Hugging Face hub: snapshots without pickles, and its errors in plain words."""

import errno
import os
from pathlib import Path

from config import BUNDLED, MODELS
from qlora.cli import UserError, first_line
from qlora.fetch import hide_passwords

# Weights as safetensors only: unpickling a .bin runs whatever code its author put there.
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model"]
WANTED += ["merges.txt", "vocab*"]
UNWANTED = ["original/*", "consolidated*", "onnx/*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.h5"]
# What huggingface_hub and httpx raise where nothing answers.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE)
UNREACHABLE = {"LocalEntryNotFoundError", "ConnectionError", "HTTPError"}


def snapshot(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """(folder, commit) of a hub model's config, tokenizer and safetensors; UserError says the way out."""
    from huggingface_hub import snapshot_download

    try:
        patterns = {"allow_patterns": WANTED, "ignore_patterns": UNWANTED}
        folder = Path(snapshot_download(hub_id, revision=revision, **patterns))
    except Exception as error:  # its own kinds, httpx's and OSError; explain() re-raises others
        raise explain(error, hub_id, "model") from None
    return folder, folder.name  # the cache names a snapshot's folder by its commit


def config_file(hub_id: str) -> Path:
    """A hub model's config.json alone, for planning without weights; UserError says the way out."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:
        raise explain(error, hub_id, "model") from None


def explain(error: Exception, name: str, kind: str) -> UserError:
    """A UserError for what the hub's client raised; re-raises what the disk says."""
    causes, cause = [], error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    statuses = {getattr(getattr(cause, "response", None), "status_code", None) for cause in causes}
    missing = "DatasetNotFoundError" in kinds  # of `datasets`, for gated ones too
    if "GatedRepoError" in kinds or missing and "gated" in str(error):
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        what = f"{name} is gated: ask for access at {page}, then `hf auth login`"
    elif "RepositoryNotFoundError" in kinds or missing:
        presets = f"; presets: {', '.join(MODELS)}" if kind == "model" else ""
        what = f"the hub has no {kind} '{name}' (or it is private and no token is set){presets}"
    elif "RevisionNotFoundError" in kinds:
        what = f"the hub's {name} has no such revision"
    elif statuses & {401, 403}:
        what = f"the hub refuses this token for {name}: `hf auth login` again, or unset HF_TOKEN"
    elif "HFValidationError" in kinds:
        what = f"'{name}' is neither a file or folder here nor a hub id (owner/name)"
    elif kinds & UNREACHABLE:
        what = f"the Hugging Face hub can't be reached ({type(error).__name__}); {name} is not in the cache"
    elif isinstance(error, (MemoryError, OSError)) and getattr(error, "errno", None) in DISK:
        raise error
    elif kind == "dataset":  # one without data files, with several configurations, with a script, …
        what = f"--dataset {name} can't be loaded ({without_secrets(first_line(error))})"
    else:  # an address, a token, a proxy or a certificate file that the client can't use
        why = f"{type(error).__name__}: {without_secrets(first_line(error))}"
        what = (
            f"the Hugging Face hub can't be asked ({why}); check HF_ENDPOINT, HF_TOKEN, proxy, certificates"
        )
    instead = f"--model {BUNDLED}" if kind == "model" else "--dataset imdb"
    return UserError(f"{what}; without the hub: {instead}")


def without_secrets(text: str) -> str:
    """Without passwords in addresses and the hub's token."""
    token = os.environ.get("HF_TOKEN") or "\0"
    return hide_passwords(text.replace(token, "****"))
