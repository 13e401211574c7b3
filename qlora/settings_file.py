"""Settings in a YAML file: `--config run.yaml` reads one, a training run writes its own as config.yaml."""

import difflib
import typing
from pathlib import Path

import yaml

from qlora.aliases import ALIASES, ELSEWHERE, JOINED, look_up
from qlora.cli import LIMITS, UsageError, require

LARGEST = 1 << 20  # bytes
MOST_PROBLEMS = 8  # that are told at once
# What a run is to do, rather than how: not written into its file.
NOT_WRITTEN = ("config", "resume", "overwrite", "test", "preview", "find_lr")
NOT_WRITTEN += ("push_to_hub", "private")


class Nested:
    """Stands for a value that is neither one value nor a list of them; it is not read."""

    def __str__(self) -> str:
        return "nested"


def read_settings(path: Path, kind: type) -> tuple[dict, list[str]]:
    """({setting: value} of a file, by the types of the dataclass `kind`; what in it is not needed here).

    UsageError tells everything that is wrong in one line.
    """
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name != "config"}
    found: dict[str, object] = {}
    understood, not_needed = [], []
    given, problems = entries(path)
    for key, value, line in given:
        name = key.replace("-", "_")
        if value is None and name not in hints and (name in ALIASES or name in ELSEWHERE):
            continue  # left empty
        try:
            ours = look_up(name, value, hints)
            if ours is None:
                not_needed.append(f"{key}: {shown(value)}")
                continue
            setting, value = ours[0], checked(hints[ours[0]], ours)
        except KeyError:
            problems.append(f"line {line}: {key}: no such setting{near(name, hints)}")
        except ValueError as problem:
            problems.append(f"line {line}: {problem}")
        else:
            if setting != name:
                understood.append(f"{key} is {setting}")
            if found.setdefault(setting, value) != value:
                problems.append(f"line {line}: {key}: {setting} is {shown(found[setting])} already")
    if problems:
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        rest = f"; the rest is understood ({', '.join(understood)})" if understood else ""
        raise UsageError(f"--config {path}: {'; '.join(problems[:MOST_PROBLEMS] + more)}{rest}")
    return found, not_needed


def entries(path: Path) -> tuple[list[tuple[str, object, int]], list[str]]:
    """((key, value, line) of each line of a YAML file, the keys that stand there twice).

    Raises UsageError for what is none.
    """
    name = f"--config {path}"
    require(not path.is_dir(), f"{name}: a folder; name a file")
    require(path.is_file(), f"{name}: no such file; presets are in configs/")
    require(path.stat().st_size <= LARGEST, f"{name}: larger than 1 MB: no file of settings")
    flat, pairs, lines, twice = "expected lines of `setting: value`", [], {}, []
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        require(isinstance(root, yaml.MappingNode), f"{name}: {flat}")
        for key, value in root.value:
            require(isinstance(key, yaml.ScalarNode), f"{name}: {flat}")
            line = key.start_mark.line + 1
            first = lines.setdefault(key.value.replace("-", "_"), line)
            if first != line:
                twice.append(f"{key.value} stands there twice, in lines {first} and {line}")
                continue
            single = isinstance(value, yaml.ScalarNode)
            rows = isinstance(value, yaml.SequenceNode) and all(
                isinstance(each, yaml.ScalarNode) for each in value.value
            )
            read = loader.construct_object(value, deep=True) if single or rows else Nested()
            pairs.append((key.value, read, line))
    except UnicodeDecodeError:
        raise UsageError(f"{name}: not text in UTF-8") from None
    except RecursionError:
        raise UsageError(f"{name}: nested far too deep; {flat}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, say
        mark, why = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{name}: {where}no YAML: {str(why).splitlines()[0][:160]}; {flat}") from None
    return pairs, twice


def checked(hint, setting: tuple[str, object]):
    """The value of (name, value) as its type; ValueError says what is wrong with it.

    YAML takes 5e-4 for a text (it wants 5.0e-4): here it is a number where one is wanted.
    """
    from pydantic import TypeAdapter, ValidationError

    name, value = setting
    if isinstance(value, Nested):
        raise ValueError(f"{name}: settings are flat, one value or a list; this is nested")
    if name in JOINED and isinstance(value, list):
        value = ",".join(map(str, value))
    kinds = {typing.get_origin(each) or each for each in (hint, *typing.get_args(hint))}
    given, texts = value, str in kinds or tuple in kinds
    if tuple in kinds and isinstance(value, (str, int, float)):
        value = [value]
    try:
        result = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"].removeprefix("Input ")
        why = "should be a path" if Path in kinds else why
        quotes = "; put it into quotes" if isinstance(given, (int, float)) and texts else ""
        raise ValueError(f"{name}: {shown(given)} {why}{quotes}") from None
    if isinstance(value, bool) and not isinstance(result, bool):  # True is 1 in Python
        raise ValueError(f"{name}: {shown(value)} should be a number")
    if name in LIMITS and result is not None and not LIMITS[name][0](result):
        raise ValueError(f"{name}: {shown(value)} {LIMITS[name][1]}")
    return result


def shown(value) -> str:
    return str(value)[:60] if not isinstance(value, bool) else str(value).lower()


def near(name: str, known) -> str:
    """'; did you mean samples?'"""
    usual = [other for other, meant in ALIASES.items() if isinstance(meant, str) and meant in known]
    close = difflib.get_close_matches(name, [*known, *usual], 1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def as_yaml(settings) -> str:
    """All settings as a file for --config, with which the run can be repeated."""
    values = {k: v for k, v in vars(settings).items() if k not in (*NOT_WRITTEN, "run_name")}
    plain = {
        k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
        for k, v in values.items()
    }
    about = "# Every setting of this run. Again: python qlora_finetune.py --config THIS --output-dir NEW\n"
    return about + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)
