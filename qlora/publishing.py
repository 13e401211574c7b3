"""--push-to-hub: an adapter, a merged model or GGUF files -> a repository of the Hugging Face hub.

Files are named one by one, so nothing else of a folder goes out; texts go out as copies without local paths.
A push is one commit: it arrives whole or not at all, and repeating it changes nothing.
"""

import contextlib
import hashlib
import json
import re
import shlex
import warnings
from pathlib import Path

from qlora import processes
from qlora.cards import PEFT, PLAIN, plain_card
from qlora.cli import UserError, note, require
from qlora.files import SEAL, broken_files, read_json
from qlora.hub import ADAPTER_FILES, REPOSITORY, TOKENIZER_FILES, asking

RECORDS = ("README.md", "report.md", "report.json", "curves.png")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", SEAL, "README.md")
MODEL_FILES += TOKENIZER_FILES
# What a model reads or wrote: it looks for no paths there, a prompt may be "/no_think".
TEXTS = ("prompt", "question", "evaluation", "chat_template", "added_tokens_decoder", "weight_map")
PATH = re.compile(
    r"(?:(?<=[\s'\"(=,])|^)(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s/\\'\",:()]+[/\\])+[^\s/\\'\",:()]+"
)
ROW = "(left out: a row of a local file)"


def check(s) -> None:
    """Before the long part: is there a token, may it write, does the repository have the asked visibility?

    `s`: any settings with push_to_hub and private. Makes the repository. Raises UserError.
    """
    require(bool(s.push_to_hub) or not s.private, "--private: goes with --push-to-hub")
    if not s.push_to_hub or not processes.is_first():
        return
    repo, flag = s.push_to_hub, f"--push-to-hub {s.push_to_hub}"
    require(bool(REPOSITORY.fullmatch(repo)), f"{flag}: no name of a repository; write you/name")
    with asking(repo, "repository"):
        from huggingface_hub import CommitOperationAdd, HfApi, get_token

        api = HfApi()
        require(get_token() is not None, f"{flag}: no token; `hf auth login`, or set HF_TOKEN (docs/hub.md)")
        account = api.whoami()
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        require(role != "read", f"{flag}: this token may only read; make one that may write (docs/hub.md)")
        api.create_repo(repo, private=s.private or None, exist_ok=True)
        visibility(api, s)
        # Asks which way a small file would go: the hub answers only who may write. Nothing is uploaded.
        api.preupload_lfs_files(repo, [CommitOperationAdd("README.md", b"x")])
    note(f"hub        {repo}: {account.get('name')} may write there")


def visibility(api, s) -> str:
    """'private' or 'public'; UsageError where --private was asked for and everybody can read it."""
    private = bool(api.model_info(s.push_to_hub).private)
    public = f"--private: {s.push_to_hub} is there already and public; make it private in its settings"
    require(private or not s.private, f"{public}, or choose another name")
    return "private" if private else "public"


def push_adapter(s, folder: Path, again: str) -> None:
    """Adapter, tokenizer, prompt, card and report of a run's folder, if it was asked for.

    `again`: the command that repeats the push, without its own flags.
    """
    if not s.push_to_hub or not processes.is_first():
        return
    files = public_copies(folder, (*ADAPTER_FILES, *RECORDS))
    if "README.md" not in files:
        base = str(read_json(folder / ADAPTER_FILES[0], "").get("base_model_name_or_path") or "")
        files["README.md"] = plain_card(s.push_to_hub.split("/")[1], base, [], **PEFT).encode()
    files["README.md"] = files["README.md"].replace(b'"this-folder"', f'"{s.push_to_hub}"'.encode())
    upload(s, files, folder, again)


def push_model(s, folder: Path) -> None:
    """A plain model, if it was asked for: config, tokenizer, safetensors and its card."""
    if not s.push_to_hub:
        return
    if broken := broken_files(folder):
        raise UserError(f"--model {folder}: {broken[0]} is missing or not what was written; merge it again")
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    require(bool(weights), f"--model {folder}: no .safetensors file in it, so there is nothing to push")
    files = public_copies(folder, (*MODEL_FILES, *weights))
    if "README.md" not in files:
        files["README.md"] = plain_card(s.push_to_hub.split("/")[1], "", [], **PLAIN).encode()
    upload(s, files, folder, f"python qlora_inference.py --adapter none --model {shlex.quote(str(folder))}")


def push_chosen(s, chosen: list) -> None:
    """What is there already: the adapter, or with --adapter none the folder --model."""
    if not chosen:
        push_model(s, Path(s.model))
        return
    folder = chosen[0].folder
    push_adapter(s, folder, f"python qlora_inference.py --adapter {shlex.quote(str(folder))}")


def upload(s, files: dict[str, Path | bytes], folder: Path, again: str) -> None:
    """One commit of {name there: file or content}; UserError says what repeats it.

    `again`: the command that does, without the flags of the push.
    """
    repeat = f"{again} --push-to-hub {s.push_to_hub}{' --private' if s.private else ''}"
    repeat = f"all of it is still in {folder}; again: {repeat}"
    try:
        with asking(s.push_to_hub, "repository"), warnings.catch_warnings(), quiet():
            from huggingface_hub import CommitOperationAdd, HfApi

            use_xet_if_offered(s.push_to_hub)
            warnings.simplefilter("ignore")  # of a card that says less than the hub would like
            api = HfApi()
            seen_by = visibility(api, s)
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            size = sum(operation.upload_info.size for operation in operations)
            note(f"uploading  {len(files)} files, {size / 1e6:.1f} MB, to {s.push_to_hub} ({seen_by})")
            done = api.create_commit(s.push_to_hub, operations, commit_message="Upload by QLoRA")
            note(f"uploaded   {api.endpoint}/{s.push_to_hub} at {done.oid}")
    except UserError as error:
        raise UserError(f"{error}; {repeat}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped while uploading; {repeat}") from None


def use_xet_if_offered(repo: str) -> None:
    """Large files go by the hub's newer storage (xet) or by LFS, which every hub has.

    huggingface_hub 2.4 takes xet wherever hf_xet is installed, and waits minutes for a server without it.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    address = f"{constants.ENDPOINT}/api/models/{repo}/xet-write-token/main"
    offered = get_session().get(address, headers=build_hf_headers()).headers
    if constants.HUGGINGFACE_HEADER_X_XET_ENDPOINT not in offered:
        constants.HF_HUB_DISABLE_XET = True


@contextlib.contextmanager
def quiet():
    """Without the client's own remarks: that nothing has changed is no warning."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def public_copies(folder: Path, names: tuple[str, ...]) -> dict[str, Path | bytes]:
    """{name: the file, or its content without local paths and rows of own files}, of those that are there."""
    files: dict[str, Path | bytes] = {name: folder / name for name in names if (folder / name).is_file()}
    small = [name for name in files if name.endswith(".json") and name not in (SEAL, *TOKENIZER_FILES[:1])]
    small = [name for name in small if name not in ("vocab.json", "added_tokens.json")]
    documents = {name: read_json(folder / name, "write it again") for name in small}
    hidden = hidden_words(documents)
    for name, document in documents.items():
        kept = without_examples(document) if has_own_rows(documents) else document
        if (public := without(kept, hidden)) != document:
            files[name] = (json.dumps(public, indent=2) + "\n").encode()
    for name in [name for name in files if name.endswith(".md")]:
        files[name] = without((folder / name).read_text(encoding="utf-8"), hidden).encode()
    if SEAL in files:  # the copies are what is compared there
        hashes = read_json(folder / SEAL, "write it again", dict[str, str])
        changed = {name: new for name, new in files.items() if isinstance(new, bytes) and name in hashes}
        hashes |= {name: hashlib.sha256(new).hexdigest() for name, new in changed.items()}
        files[SEAL] = (json.dumps(hashes, indent=2) + "\n").encode()
    return files


def hidden_words(documents: dict) -> list[tuple[str, str]]:
    """[(what others should not read, what stands there instead)], the longest first."""
    paths = {path for document in documents.values() for path in local_paths(document)}
    paths |= {str(Path(path).parent) for path in paths if path.lower().endswith(".gguf")}  # transformers' way
    hidden = {path: Path(path.replace("\\", "/")).name for path in paths}
    if (home := str(Path.home())) != "/":
        hidden[f"{home}/"] = "~/"
    if has_own_rows(documents):  # as report.md and the card quote them
        rows = examples(documents.get("report.json", {}).get("evaluation", {}))
        hidden |= {f"> {text}": f"> {ROW}" for text in rows}
        hidden |= {text: ROW for text in rows if len(text) > 20}  # a short one can be a part of any word
    return sorted(hidden.items(), key=lambda pair: -len(pair[0]))


def has_own_rows(documents: dict) -> bool:
    """Whether it was trained on a file: its rows are the owner's."""
    data = documents.get("qlora.json", {}).get("dataset") or {}
    return any(part.get("sha256") for part in (data, *(data.get("parts") or ())))


def examples(value) -> list[str]:
    """Texts of rows in a report: the strings, but for labels, in its lists of examples."""
    if not isinstance(value, dict):
        return []
    rows = [row for row in value.get("examples", []) if isinstance(row, dict)]
    labels = ("kind", "truth", "before", "after")
    found = [text for row in rows for key, text in row.items() if key not in labels and isinstance(text, str)]
    return [text for text in found if text] + [text for part in value.values() for text in examples(part)]


def without_examples(value):
    """A report with empty lists of examples."""
    if not isinstance(value, dict):
        return value
    return {k: [] if k == "examples" else without_examples(v) for k, v in value.items()}


def local_paths(value) -> set[str]:
    """Absolute paths (and ~/…, ../…) in a JSON document, but for what is text for a model."""
    if isinstance(value, dict):
        return set().union(*(local_paths(v) for k, v in value.items() if k not in TEXTS))
    if isinstance(value, list):
        return set().union(*map(local_paths, value))
    if not isinstance(value, str):
        return set()
    several = re.search(r"\s(?:~|\.{1,2}|[A-Za-z]:)?[/\\]", value)  # paths with spaces between them
    whole = value.count("/") > 1 and "\n" not in value and Path(value).is_absolute() and not several
    return {value} if whole else set(PATH.findall(value))


def without(value, hidden: list[tuple[str, str]]):
    """The document or text with the hidden words replaced; a prompt stays as it is."""
    if isinstance(value, dict):
        return {k: v if k == "prompt" else without(v, hidden) for k, v in value.items()}
    if isinstance(value, list):
        return [without(each, hidden) for each in value]
    if isinstance(value, str):
        for words, instead in hidden:
            value = value.replace(words, instead)
    return value
