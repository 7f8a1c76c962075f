"""The layout of the package: a core that imports little, and a name for each thing."""

import ast
import subprocess
import sys
from collections import defaultdict

from entrodrop_utils.paths import PACKAGE

CORE = ("entropy", "similarity", "residual", "scoring", "selection", "dropping")
NOT_NEEDED = ("lm_eval", "datasets", "papermill", "ipywidgets", "matplotlib", "scipy.stats")
WINGS = ("cache", "text", "tasks", "runner", "models", "profile", "explorer")
FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_core_imports_neither_the_wings_nor_their_libraries():
    unwanted = [*NOT_NEEDED, *(f"{PACKAGE.name}.{wing}" for wing in WINGS)]
    code = "import sys\n" + "".join(f"import {PACKAGE.name}.{module}\n" for module in CORE)
    code += f"print(*(name for name in {unwanted} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_two_public_things_share_a_name():
    places = defaultdict(list)
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
                places[node.name].append(file.relative_to(PACKAGE).as_posix())
    places.pop("main")
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_no_module_has_the_name_of_a_folder_beside_it():
    assert [file for file in FILES if file.with_suffix("").is_dir()] == []
