"""The lists that must agree: dependencies, the lock, conda's environment, the README."""

import re
import tomllib
from importlib.metadata import requires

import pytest
import yaml

from entrodrop_utils.paths import ROOT

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


def test_the_purpose_of_each_dependency_is_stated():
    readme = (ROOT / "entrodrop_utils" / "README.md").read_text().lower()
    for requirement in declared():
        assert f"`{name(requirement)}`" in readme, requirement


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8192


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("[den]*/**/README.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / link).exists(), f"{page} names {link}"
