"""The examples in the docstrings of the package and of every public name, run as they are written."""

import copy
import doctest
import math

import pytest
import torch
from reference import word_tokenizer

import entrodrop_utils
from entrodrop_utils.residual import find
from entrodrop_utils.selection import stage_boundary


@pytest.mark.parametrize("name", [entrodrop_utils.__name__, *entrodrop_utils.__all__])
def test_the_examples_of_a_docstring_are_true(name, model, windows, tmp_path):
    shown = {public: getattr(entrodrop_utils, public) for public in entrodrop_utils.__all__}
    documented = shown.get(name, entrodrop_utils)
    held_out = torch.randint(0, 101, (4, 24), generator=torch.Generator().manual_seed(2))
    names = shown | {"model": model, "windows": windows, "held_out": held_out, "n_layers": 6, "tokenizer": word_tokenizer()}
    names |= {"tmp_path": tmp_path, "copy": copy, "math": math, "find": find, "stage_boundary": stage_boundary}
    names[name] = documented  # `windows` is the text in all examples but its own
    (examples,) = doctest.DocTestFinder(exclude_empty=False, recurse=False).find(documented, name, module=False, globs=names)
    report: list[str] = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(examples, out=report.append)
    assert tried, f"{name} has no example"
    assert not failed, "".join(report)
