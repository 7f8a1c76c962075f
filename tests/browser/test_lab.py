"""The notebooks where people use them: in JupyterLab, in a browser."""

import re
import shutil
import time
from pathlib import Path

import pytest

from entrodrop_utils.residual import find
from entrodrop_utils.saving import load_pruned

pytestmark = pytest.mark.browser


def opened(page, lab: str, path: str):
    """The notebook in Lab, its kernel ready; the panel that holds it."""
    page.goto(f"{lab}/lab/tree/{path}?reset&token=browser-tests")
    panel = page.locator(".jp-NotebookPanel:visible")
    panel.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
    return panel


def run_all(page, panel) -> None:
    """Run All Cells; again while no cell waits and none has run: what is sent before the kernel listens is lost."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        prompts = panel.locator(".jp-InputPrompt").all_inner_texts()
        if any(re.fullmatch(r"\[\d+\]:", prompt.strip()) for prompt in prompts):
            return
        if not any("*" in prompt for prompt in prompts):
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(3000)
    pytest.fail("the kernel runs nothing")


def finding(panel) -> str:
    """The sentence of the last cell, once it is there."""
    last = panel.locator(".jp-CodeCell").last.locator(".jp-RenderedMarkdown")
    last.wait_for(timeout=480_000)
    assert not panel.locator("[data-mime-type='application/vnd.jupyter.error'], .jp-OutputArea-error").count()
    return last.inner_text()


def measured(panel, seconds: float = 180, before: str = "") -> dict[str, str]:
    """The pruned column of the explorer's table, once everything in it has been measured and it is not what it was before."""
    table = panel.locator(".entrodrop-table")
    deadline = time.monotonic() + seconds
    while "computing" in (said := table.inner_text()) or said == before:
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    rows = [[cell.inner_text() for cell in row.locator("td").all()] for row in table.locator("tbody tr").all()]
    names = ("perplexity", "kl", "parameters", "cache", "text")
    return dict(zip(names, (pruned for _, pruned in rows), strict=True))


def number(said: str) -> float:
    return float(re.match(r"[\d.]+", said).group())


@pytest.fixture
def explorer(page, lab, copied):
    """The explorer's notebook, run."""
    panel = opened(page, lab, copied("11_explorer.ipynb"))
    start = time.monotonic()
    run_all(page, panel)
    assert "KV cache" in finding(panel)
    print(f"Run All of 11 took {time.monotonic() - start:.0f} s")
    panel.locator(".entrodrop-table").scroll_into_view_if_needed()
    return panel


def test_explorer(page, explorer, screenshots):
    before = measured(explorer)
    page.screenshot(path=screenshots / "explorer.png")
    slider, table = explorer.get_by_role("slider").first, explorer.locator(".entrodrop-table")
    said = table.inner_text()
    n = int(float(slider.get_attribute("aria-valuenow")))
    start = time.monotonic()
    slider.press("ArrowRight")
    page.get_by_text(f"without {n + 1} of 30 attention layers").first.wait_for()
    moved = measured(explorer, before=said)
    print(f"a move of the slider was answered after {time.monotonic() - start:.1f} s")
    assert number(moved["parameters"]) < number(before["parameters"])
    assert number(moved["kl"]) != number(before["kl"])
    assert number(moved["cache"]) < number(before["cache"])
    assert moved["text"]

    bar = explorer.get_by_title("attention 16: ")
    assert bar.get_attribute("title").endswith("kept")
    said = table.inner_text()
    bar.click()
    page.get_by_text(f"without {n + 2} of 30 attention layers").first.wait_for()
    clicked = measured(explorer, before=said)
    assert explorer.get_by_title("attention 16: ").get_attribute("title").endswith("dropped by hand")
    assert "entrodrop-gone" in bar.get_attribute("class")
    assert number(clicked["perplexity"]) != number(moved["perplexity"])
    page.screenshot(path=screenshots / "explorer-clicked.png")

    explorer.get_by_role("button", name="Export as code").click()
    explorer.get_by_role("button", name="Save pruned model").click()
    said = explorer.get_by_role("status").filter(has_text="load_pruned(").inner_text()
    page.screenshot(path=screenshots / "explorer-saved.png")
    folder = Path(re.search(r"load_pruned\('(.+)'\)", said).group(1))
    try:
        saved = load_pruned(folder)
    finally:
        shutil.rmtree(folder)
    assert {s.layer for s in find(saved, "attention")}.isdisjoint({16})
    assert len(find(saved, "attention")) == 30 - n - 2
    assert f"{saved.num_parameters() / 1e6:.1f} M" in clicked["parameters"]


def test_explorer_says_what_is_wrong(page, explorer, screenshots):
    model = explorer.get_by_role("combobox", name="model")
    model.fill("nonsense")
    model.press("Enter")
    alert = explorer.get_by_role("alert")
    alert.wait_for()
    assert "unknown model 'nonsense': choose one of" in alert.inner_text()
    model.scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "explorer-error.png")


def test_another_notebook_with_a_parameter_changed(page, lab, copied, screenshots):
    panel = opened(page, lab, copied("01_layerwise_entropy.ipynb"))
    parameter = panel.locator(".cm-line").filter(has_text=re.compile("^n_tokens: int = 256"))
    parameter.get_by_text("256", exact=True).dblclick()
    page.keyboard.type("64")
    panel.locator(".cm-line").filter(has_text=re.compile("^n_tokens: int = 64")).wait_for()
    run_all(page, panel)
    assert "bucket entropy" in finding(panel)
    assert "24 windows of 64 tokens" in panel.inner_text()
    page.screenshot(path=screenshots / "01-parameter.png")
