"""The explorer's notebook with the default model: from Run All to a saved model, and how long it takes and what it holds."""

import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_explorer_page import counted, settle
from test_lab import finding, opened, run_all

from entrodrop_utils.paths import BUILD
from entrodrop_utils.profile import DEFAULT_MODEL
from entrodrop_utils.residual import find
from entrodrop_utils.saving import load_pruned
from entrodrop_utils.studies.speed import processor

pytestmark = pytest.mark.browser
ACTIONS = 200
FAR = (20, 26, 15, 23, 5, 18, 2)  # numbers dropped: far from each other, and from where measuring ahead begins
PAUSE = 500  # milliseconds after an action
UNKNOWN, KNOWN = "a move to a count not measured", "a move to a measured count"
GOALS = {"first view after Run All": 30, "Run All": 60, UNKNOWN: 2, KNOWN: 0.2}
GOALS |= {f"memory of the kernel{when} {ACTIONS} actions": 3 for when in (" after", ", most in")}


@pytest.fixture
def took():
    """What was measured: seconds from Run All to what came of it, and of moves."""
    return {UNKNOWN: [], KNOWN: []}


@pytest.fixture
def explorer(page, lab, copied, took):
    """The notebook run to its finding."""
    page.set_default_timeout(600_000)
    panel = opened(page, lab, copied("11_explorer.ipynb"))
    start = time.monotonic()
    run_all(page)
    shown = panel.locator(".ed")
    shown.locator(".ed-cell").first.wait_for()
    took["first view after Run All"] = [time.monotonic() - start]
    assert "KV cache" in finding(panel)
    took["Run All"] = [time.monotonic() - start]
    return shown


def cells(explorer, row: int = 1) -> list[str]:
    return explorer.locator(".ed-table tbody tr").nth(row).locator("td").all_inner_texts()


def moved(page, explorer, n: int) -> float:
    """Seconds from a move of the slider to the numbers of that selection, seen in the browser itself."""
    return page.evaluate(
        """async ([root, n]) => {
        const slider = root.querySelector('input[type=range]'), start = performance.now();
        slider.value = n;
        slider.dispatchEvent(new Event('input'));
        const there = () => root.querySelector('.ed-counted').textContent.startsWith(`without ${n} of`)
            && !root.querySelector('.ed-now td').classList.contains('ed-missing');
        while (!there()) await new Promise(done => setTimeout(done, 5));
        return (performance.now() - start) / 1000; }""",
        [explorer.element_handle(), n],
    )


def test_from_run_all_to_a_saved_model(page, explorer, screenshots):
    settle(page, explorer)
    counted(explorer, "8 of 30 attention layers")  # as the finding says
    assert explorer.bounding_box()["y"] < page.viewport_size["height"]  # in sight, though the last cell ran last
    before = cells(explorer)
    explorer.get_by_role("slider").press("ArrowRight")
    counted(explorer, "9 of 30 attention layers")
    settle(page, explorer)
    after = cells(explorer)
    assert float(after[2].split()[0]) != float(before[2].split()[0])  # perplexity
    assert float(after[4].split()[0]) < float(before[4].split()[0])  # parameters
    explorer.get_by_role("button", name="Save…").click()
    folder = BUILD / "pruned" / "from-the-browser"
    shutil.rmtree(folder, ignore_errors=True)
    explorer.get_by_label("folder").fill(str(folder))
    explorer.get_by_role("button", name="Save", exact=True).click()
    explorer.locator(".ed-saved", has_text="load_pruned(").wait_for()
    page.screenshot(path=screenshots / "explorer-saved.png")
    try:
        saved, card = load_pruned(folder), (folder / "README.md").read_text()
    finally:
        shutil.rmtree(folder)
    assert len(find(saved, "attention")) == 21
    assert f"{saved.num_parameters() / 1e6:.1f} M" in after[4]
    assert "Chosen by bucket (bins 20), one-shot, measured on 6 windows of 80 tokens of docs" in card


def memory(pid: int) -> tuple[float, float]:
    """Gigabytes that a process holds now and held at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return tuple(int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1e6 for name in ("VmRSS", "VmHWM"))


def kernel() -> int:
    """The process of this test's kernel: the newest that runs one from this project's Lab."""
    kernels = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            if b"ipykernel_launcher" in command and b"jupyter0/runtime" in command:
                kernels.append((folder.stat().st_ctime, int(folder.name)))
        except OSError:
            continue
    return max(kernels)[1]


def written(took: dict[str, list[float]], units: dict[str, str]) -> None:
    """What was measured so far as build/explorer.csv."""
    rows = []
    for what, values in took.items():
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        row = {"what": what, "n": len(values), "median": middle, "quartile_low": low, "quartile_high": high}
        rows.append(row | {"unit": units.get(what, "s"), "goal": GOALS[what]})
    where = {"model": DEFAULT_MODEL, "browser": "Chromium, headless", "processor": processor(), "cores": os.cpu_count()}
    pd.DataFrame(rows).assign(**where).to_csv(BUILD / "explorer.csv", index=False, float_format="%.3g")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_session_of_two_hundred_actions(page, explorer, took):
    """Memory stays under 3 GB; the medians of what a person waits for go to build/explorer.csv (``make bench-explorer``)."""
    pid = kernel()
    settle(page, explorer)
    explorer.get_by_role("button", name="cosine's 37.5%").click()
    explorer.locator(".ed-now th", has_text="cosine").wait_for()
    settle(page, explorer)
    for n in FAR:
        took[UNKNOWN].append(moved(page, explorer, n))
        settle(page, explorer)
    for n in FAR * 3:
        took[KNOWN].append(moved(page, explorer, n))
    written(took, {})
    kinds, metrics = ("mlp", "block", "attention"), ("knn", "cosine", "bucket", "norm_ratio")
    for action in range(ACTIONS - 4 * len(FAR) - 1):
        layer = action * 7 % 30
        if action % 20 == 19:
            explorer.locator("[data-setting=kind]").select_option(kinds[action // 20 % 3])
        elif action % 20 == 9:
            explorer.locator("[data-setting=metric]").select_option(metrics[action // 20 % 4])
        elif action % 10 == 4:
            explorer.get_by_role("button", name="Follow the ranking").evaluate("button => button.click()")
        elif action % 2:
            explorer.locator(f".ed-cell[data-layer='{layer}'][data-kind='mlp']").click(force=True)
        else:
            explorer.get_by_role("slider").press("ArrowRight" if action % 4 else "ArrowLeft")
        page.wait_for_timeout(PAUSE)
        took[f"memory of the kernel, most in {ACTIONS} actions"] = [memory(pid)[1]]
    settle(page, explorer)
    took[f"memory of the kernel after {ACTIONS} actions"] = [memory(pid)[0]]
    written(took, {what: "GB" for what in took if what.startswith("memory")})
    assert memory(pid)[1] < 3
