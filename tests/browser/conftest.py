"""JupyterLab as a person starts it, and a headless browser in front of it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from entrodrop_utils.paths import BUILD, NOTEBOOKS, ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TOKEN = "browser-tests"
# No dialog about news, and every cell in the page, also those out of sight
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}


@pytest.fixture(scope="session")
def browser():
    """A headless browser; a machine without one skips the test and says so."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the lock file has it")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser on this machine: none of {', '.join(BROWSERS)} (on Debian: apt install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A page as wide as a small laptop."""
    page = browser.new_page(viewport={"width": 1366, "height": 768})
    page.set_default_timeout(240_000)  # of a busy machine
    yield page
    page.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The address of a JupyterLab that serves the project with settings of its own."""
    home = tmp_path_factory.mktemp("jupyter")
    for name, values in SETTINGS.items():
        file = home / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings"}
    folders |= {"JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    env = {**os.environ, **{key: str(home / name) for key, name in folders.items()}}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        f"--IdentityProvider.token={TOKEN}",
    ]
    command += [f"--ServerApp.root_dir={ROOT}", "--ServerApp.port_retries=0", *(["--allow-root"] if os.geteuid() == 0 else [])]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while not _answers(address):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail((home / "log").read_text())
            time.sleep(0.3)
        yield address
    finally:
        server.terminate()  # Lab ends its kernels
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def _answers(address: str) -> bool:
    try:
        return bool(asked(address, "status"))
    except OSError:
        return False


def asked(address: str, what: str, method: str = "GET"):
    """What Lab's server answers."""
    request = urllib.request.Request(f"{address}/api/{what}", headers={"Authorization": f"token {TOKEN}"}, method=method)
    with urllib.request.urlopen(request, timeout=90) as answer:
        return json.loads(answer.read() or "null")


@pytest.fixture
def copied(lab):
    """Copies a notebook, without its outputs, to where Lab can open it; its path as Lab names it."""
    folder = BUILD / "browser"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def copy(name: str) -> str:
        notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / name)
        return str((folder / name).relative_to(ROOT))

    yield copy
    for session in asked(lab, "sessions"):  # the next test has a fresh kernel, and this one's work ends
        asked(lab, f"sessions/{session['id']}", "DELETE")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where pictures of the page go, to be looked at."""
    folder = BUILD / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A picture of the page when a test fails: what was wrong is mostly to be seen there."""
    report = yield
    if report.failed and (page := item.funcargs.get("page")):
        page.screenshot(path=BUILD / "screenshots" / f"{item.name}-failed.png", full_page=True)
    return report
