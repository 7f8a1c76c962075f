"""The notebooks where people use them: in JupyterLab, in a browser."""

import re
import time

import pytest

pytestmark = pytest.mark.browser


def opened(page, lab: str, path: str):
    """The notebook in Lab, its kernel ready; the panel that holds it."""
    page.goto(f"{lab}/lab/tree/{path}?reset&token=browser-tests")
    panel = page.locator(".jp-NotebookPanel:visible")
    panel.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
    return panel


def run_all(page, panel) -> None:
    """Run All Cells; again while none has run and the kernel is idle: what is sent before it listens, or to one that a slow Lab
    replaced, is lost.
    """
    deadline, idle = time.monotonic() + 180, panel.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    waits = 0
    while time.monotonic() < deadline:
        prompts = panel.locator(".jp-InputPrompt").all_inner_texts()
        if any(re.fullmatch(r"\[\d+\]:", prompt.strip()) for prompt in prompts):
            return
        waits = waits + 1 if any("*" in prompt for prompt in prompts) and idle.count() else 0
        if waits > 5 or not any("*" in prompt for prompt in prompts):
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
