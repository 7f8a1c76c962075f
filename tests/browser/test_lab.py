"""The notebooks where people use them: in JupyterLab, in a browser."""

import re

import pytest

pytestmark = pytest.mark.browser


def opened(page, lab: str, path: str):
    """The notebook in Lab, its kernel ready; the panel that holds it.

    The indicator also says idle before Lab knows which kernels there are. What is run then makes it ask for one, in a dialog.
    """
    page.goto(f"{lab}/lab/tree/{path}?reset&token=browser-tests")
    panel = page.locator(".jp-NotebookPanel:visible")
    panel.locator(".jp-Toolbar-kernelName", has_text="Python 3").wait_for()
    panel.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
    return panel


def run_all(page) -> None:
    """Run All Cells."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def test_no_kernel_is_asked_for_where_lab_learns_of_them_late(page, lab, copied):
    """As on a slow machine, where the dialog used to lie over all controls."""
    page.add_init_script(
        """const fetched = window.fetch; window.fetch = async (asked, ...more) => {
        if ((asked.url ?? asked).includes('/api/kernelspecs')) await new Promise(done => setTimeout(done, 5000));
        return fetched(asked, ...more); };"""
    )
    panel = opened(page, lab, copied("01_layerwise_entropy.ipynb"))
    run_all(page)
    panel.locator(".jp-InputPrompt", has_text=re.compile(r"^\[[\d*]+\]:$")).first.wait_for()
    assert not page.locator(".jp-Dialog").count()


def finding(panel) -> str:
    """The sentence of the last cell, once it is there."""
    last = panel.locator(".jp-CodeCell").last.locator(".jp-RenderedMarkdown")
    last.wait_for(timeout=480_000)
    assert not panel.locator("[data-mime-type='application/vnd.jupyter.error'], .jp-OutputArea-error").count()
    return last.inner_text()


def test_another_notebook_with_a_parameter_changed(page, lab, copied, screenshots):
    panel = opened(page, lab, copied("01_layerwise_entropy.ipynb"))
    parameter = panel.locator(".cm-line").filter(has_text=re.compile("^n_tokens: int = 256"))
    parameter.get_by_text("256", exact=True).dblclick()
    page.keyboard.type("64")
    panel.locator(".cm-line").filter(has_text=re.compile("^n_tokens: int = 64")).wait_for()
    run_all(page)
    assert "bucket entropy" in finding(panel)
    assert "24 windows of 64 tokens" in panel.inner_text()
    page.screenshot(path=screenshots / "01-parameter.png")
