"""Scripts -> rooms -> qlora/ core -> config.py: the rule that lets a reader stop anywhere."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {"quant_llama32_4bit_lora", "qlora_finetune", "qlora_inference", "playground"}
ROOMS = {"training", "lab", "memory", "playground"}
DEPLOYMENT = {path.stem for path in (ROOT / "llama.cpp").glob("*.py")}
PRODUCT = [*ROOT.glob("*.py"), *ROOT.glob("qlora/**/*.py"), *ROOT.glob("llama.cpp/*.py")]
MUSEUM = sorted(ROOT.glob("museum/*.py"))


def imports(path: Path) -> set[str]:
    """Whole names of what a file imports, late imports included: {'qlora.training.guards', 'torch', …}"""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "qlora" and len(part) > 1} & ROOMS


def test_packages_keep_the_contracts():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_contract_names_every_core_module():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    core = {f"qlora.{path.stem}" for path in (ROOT / "qlora").glob("*.py")} - {"qlora.__init__"}
    core |= {f"qlora.{path.parent.name}" for path in (ROOT / "qlora").glob("*/__init__.py")}
    core -= {f"qlora.{room}" for room in ROOMS}
    assert set(contracts[1]["source_modules"]) == core


@pytest.mark.parametrize("path", [*PRODUCT, *MUSEUM], ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_a_script(path):
    assert not imports(path) & SCRIPTS


def test_the_museum_shows_training_and_nobody_needs_it():
    assert MUSEUM
    for path in MUSEUM:
        assert rooms_of(imports(path)) <= {"training"}, path
    for path in PRODUCT:
        assert "museum" not in {name.split(".")[0] for name in imports(path)}, path


def test_config_imports_nothing_heavy():
    assert imports(ROOT / "config.py") - {"__future__.annotations"} <= {
        *("__future__", "sys", "dataclasses", "dataclasses.dataclass", "pathlib", "pathlib.Path"),
        *("typing", "typing.Literal", "typing.Optional", "tyro.conf"),
        *("tyro.conf.Positional", "tyro.conf.UseAppendAction"),
    }


@pytest.mark.parametrize("path", sorted((ROOT / "llama.cpp").glob("*.py")), ids=lambda path: path.name)
def test_deployment_uses_the_core_alone(path):
    assert not rooms_of(imports(path))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "qlora").glob("**/*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_package_knows_nothing_of_deployment(path):
    assert not {name.split(".")[0] for name in imports(path)} & DEPLOYMENT


def test_the_trap_would_be_seen(tmp_path):
    (tmp_path / "bad.py").write_text(
        "def f():\n    from qlora.lab import formats\n    import qlora_inference\n"
    )
    found = imports(tmp_path / "bad.py")
    assert rooms_of(found) == {"lab"} and found & SCRIPTS
