"""The notebooks where people use them: in JupyterLab, in a browser."""

import re
import time

import pytest

from entrodrop_utils import dropping
from entrodrop_utils.profiles import BUILD
from entrodrop_utils.sub_blocks import find

pytestmark = pytest.mark.browser


def opened(page, lab: str, path: str):
    """The notebook in Lab, its kernel ready; the panel that holds it."""
    page.goto(f"{lab}/lab/tree/{path}?reset")
    panel = page.locator(".jp-NotebookPanel:visible")
    panel.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
    return panel


def run_all(page) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def finding(panel) -> str:
    """The sentence of the last cell, once it is there."""
    last = panel.locator(".jp-CodeCell").last.locator(".jp-RenderedMarkdown")
    last.wait_for(timeout=75_000)
    assert not panel.locator("[data-mime-type='application/vnd.jupyter.error'], .jp-OutputArea-error").count()
    return last.inner_text()


def measured(panel, seconds: float = 60) -> dict[str, str]:
    """The pruned column of the explorer's table, once everything in it has been measured."""
    table = panel.locator(".entrodrop-table")
    deadline = time.monotonic() + seconds
    while "computing" in (said := table.inner_text()):
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    rows = [[cell.inner_text() for cell in row.locator("td").all()] for row in table.locator("tbody tr").all()]
    names = ("perplexity", "kl", "parameters", "cache", "text")
    return dict(zip(names, (pruned for _, pruned in rows), strict=True))


def number(said: str) -> float:
    return float(re.match(r"[\d.]+", said).group())


def test_explorer(page, lab, copied, screenshots):
    start = time.monotonic()
    panel = opened(page, lab, copied("09_explorer.ipynb"))
    page.evaluate("document.body.style.setProperty('--none', 0)")
    run_all(page)
    assert "KV cache" in finding(panel)
    print(f"Run All: {time.monotonic() - start:.0f} s")
    table = panel.locator(".entrodrop-table")
    table.scroll_into_view_if_needed()
    before = measured(panel)
    page.screenshot(path=screenshots / "explorer.png")
    panel.locator(".entrodrop-bar").first.scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "explorer-bars.png")
    print(before)
