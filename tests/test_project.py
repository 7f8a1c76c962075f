"""The lists that must agree: dependencies, the lock, conda's environment, the README."""

import ast
import re
import tomllib
from importlib.metadata import requires

import yaml

import entrodrop_utils
from entrodrop_utils.profiles import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def declared() -> set[str]:
    return {*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]}


def test_conda_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == ["-r requirements.lock", "-e ."]
    conda = {name(item) for item in environment["dependencies"] if isinstance(item, str)}
    assert conda == {"python", "pip"}


def test_everything_declared_is_pinned_exactly():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pins = {name(line) for line in lines}
    assert {name(d) for d in declared()} <= pins
    assert "torch==2.13.0" in lines


def test_the_lock_is_closed():
    """What a pinned package needs on every platform is pinned as well (torch's CUDA libraries follow torch)."""
    pins = {name(line) for line in (ROOT / "requirements.lock").read_text().splitlines()}
    for pin in pins - {"torch"}:
        needed = {name(r) for r in requires(pin) or [] if ";" not in r}
        assert needed <= pins, pin


def test_the_readme_says_what_each_dependency_is_for():
    readme = (ROOT / "README.md").read_text().lower()
    for requirement in declared():
        assert f"`{name(requirement)}`" in readme, requirement


def test_modules_import_only_those_before_them():
    """One straight line, and every module is on it (what a function imports when it runs may point ahead)."""
    line = [entry.strip(" .\n") for entry in entrodrop_utils.__doc__.partition("before it:")[2].split(",")]
    folder = ROOT / "entrodrop_utils"
    assert sorted(line) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    for number, module in enumerate(line):
        for node in ast.parse((folder / f"{module}.py").read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                for other in [node.module] if node.module else [alias.name for alias in node.names]:
                    assert other in line[:number], f"{module} imports {other}"


def test_named_files_exist():
    for page in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / page).read_text()):
            assert (ROOT / link).exists(), f"{page} names {link}"
