"""`pip install .`: the package as it is without its repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from entrodrop_utils.paths import PACKAGE, ROOT

USE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import entrodrop_utils
from entrodrop_utils import dropped, figures, models, one_shot, paths, score, text
from entrodrop_utils.tasks import local_tasks
from transformers import LlamaConfig, LlamaForCausalLM
assert Path(entrodrop_utils.__file__).is_relative_to(sys.argv[1]), entrodrop_utils.__file__
sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
windows = torch.randint(0, 40, (2, 30))
drop_set = one_shot(score(model, windows, ["bucket"]), "bucket", "attention", 1)
with dropped(model, drop_set):
    model(windows)
assert figures.STYLE.is_file()
print(len(models.registry.KNOWN), paths.ROOT)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", folder / "site"]
    build = folder / "build"  # setuptools would leave its folders in the checkout
    shutil.copytree(PACKAGE, build / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, build)
    subprocess.run([*command, build], check=True, capture_output=True)
    return folder / "site"


def test_an_installed_package_has_its_data_files(installed):
    here = {file.relative_to(PACKAGE) for file in PACKAGE.rglob("*") if file.suffix in (".toml", ".mplstyle", ".py")}
    there = {file.relative_to(installed / PACKAGE.name) for file in (installed / PACKAGE.name).rglob("*") if file.is_file()}
    assert here <= there


def test_an_installed_package_works_without_its_repository(installed, tmp_path):
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ENTRODROP_HOME")}
    env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-P", "-c", USE, installed], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_models, root = done.stdout.split()
    assert int(n_models) > 2
    assert Path(root).is_relative_to(tmp_path)
