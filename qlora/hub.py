"""The Hugging Face hub: snapshots without pickles, and its errors in plain words."""

from __future__ import annotations

from pathlib import Path

from config import BUNDLED, MODELS
from qlora.cli import UserError

# Weights as safetensors only: unpickling a .bin runs whatever code its author put there.
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab*"]
UNWANTED = ["original/*", "consolidated*", "onnx/*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.h5"]


def snapshot(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """(folder, commit) of a hub model's config, tokenizer and safetensors; raises UserError with the way out."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:  # the hub's client raises its own kinds, httpx's and OSError; explain() re-raises others
        raise explain(error, hub_id, "model") from None
    return folder, folder.name  # the cache names a snapshot's folder by its commit


def config_file(hub_id: str) -> Path:
    """A hub model's config.json alone, for planning without weights; raises UserError with the way out."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:
        raise explain(error, hub_id, "model") from None


def explain(error: Exception, name: str, kind: str) -> UserError:
    """A UserError for what the hub's client raised; re-raises what has nothing to do with the hub."""
    from huggingface_hub import errors

    causes = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(c).__name__ for c in causes}
    instead = f"without the hub: --model {BUNDLED}" if kind == "model" else "without the hub: --dataset imdb"
    if any(isinstance(c, errors.GatedRepoError) for c in causes) or "DatasetNotFoundError" in kinds and "gated" in str(error):
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        return UserError(f"{name} is gated: ask for access at {page}, then `hf auth login`; {instead}")
    if any(isinstance(c, errors.RepositoryNotFoundError) for c in causes) or "DatasetNotFoundError" in kinds:
        presets = f"; presets: {', '.join(MODELS)}" if kind == "model" else ""
        return UserError(f"the hub has no {kind} '{name}' (or it is private and no token is set){presets}; {instead}")
    if any(isinstance(c, errors.RevisionNotFoundError) for c in causes):
        return UserError(f"the hub's {name} has no such revision; {instead}")
    if any(getattr(getattr(c, "response", None), "status_code", None) in (401, 403) for c in causes):
        return UserError(f"the hub refuses this token for {name}: `hf auth login` again, or unset HF_TOKEN; {instead}")
    if "HFValidationError" in kinds:
        return UserError(f"'{name}' is neither a file or folder here nor a hub id (owner/name); {instead}")
    unreachable = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ConnectionError",
                   "ReadTimeout", "HfHubHTTPError", "ProxyError", "HTTPStatusError", "ReadError", "RemoteProtocolError"}
    if kinds & unreachable:
        return UserError(f"the Hugging Face hub can't be reached ({type(error).__name__}) and {name} is not in the cache; {instead}")
    if kind == "dataset":  # one without data files, with several configurations, with a script, …
        return UserError(f"--dataset {name} can't be loaded ({(str(error).strip() or type(error).__name__).splitlines()[0][:160]}); {instead}")
    raise error
