"""The explorer's page in a browser, on a small random model: what a person does, and what must never disagree."""

import re
import shutil

import pytest
from test_lab import opened, run_all
from tiny_page import LAYERS, write_model, write_notebook

from entrodrop_utils.explorer.page import ExplorerWidget, Page
from entrodrop_utils.explorer.state import Explorer
from entrodrop_utils.export import gguf
from entrodrop_utils.models import load_model
from entrodrop_utils.paths import BUILD, MODELS, PACKAGE, ROOT
from entrodrop_utils.profile import Profile

pytestmark = pytest.mark.browser
SLOW = 240_000  # milliseconds: on a busy machine everything takes long, and nothing here is about time


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def explorer(page, lab, copied, tiny):
    """The page of the small model, everything that it shows measured."""
    path = BUILD / "browser" / "tiny.ipynb"
    write_notebook(path, tiny)
    page.set_default_timeout(SLOW)
    panel = opened(page, lab, str(path.relative_to(ROOT)))
    run_all(page)
    shown = panel.locator(".ed")
    shown.locator(".ed-cell").first.wait_for()
    settle(page, shown)
    return shown


def settle(page, explorer) -> None:
    """Until nothing is awaited that a person asked for."""
    handle = explorer.element_handle()
    page.wait_for_function("root => ['ahead', ''].includes(root.dataset.phase) && !root.querySelector('.ed-stale')", arg=handle)


def cell(explorer, layer: int, kind: str = "attention"):
    return explorer.locator(f".ed-cell[data-layer='{layer}'][data-kind='{kind}']")


def dropped(explorer, kind: str = "attention") -> list[int]:
    out = explorer.locator(f".ed-cell.ed-out[data-kind='{kind}']")
    return [int(one.get_attribute("data-layer")) for one in out.all()]


def counted(explorer, said: str) -> None:
    explorer.locator(".ed-counted", has_text=re.compile(f"^without {said}")).wait_for()


def agree(explorer, metric: str) -> None:
    """The field, the title, the table and the code name the same metric."""
    assert explorer.locator("[data-setting=metric]").input_value() == metric
    assert metric in explorer.locator(".ed-title").inner_text()
    assert explorer.locator(".ed-now th").inner_text().startswith(f"now: {metric}")
    assert ("metric=" in explorer.locator(".ed-line").inner_text()) == (metric != "bucket")


def test_fields_and_numbers_agree_whatever_happens(page, explorer, screenshots):
    counted(explorer, f"3 of {LAYERS} attention layers")  # a quarter
    explorer.locator("[data-setting=metric]").select_option("renyi")
    explorer.locator(".ed-cancel").click()
    settle(page, explorer)
    explorer.get_by_role("slider").press("ArrowRight")
    counted(explorer, f"4 of {LAYERS} attention layers")
    settle(page, explorer)
    agree(explorer, explorer.locator("[data-setting=metric]").input_value())

    text = explorer.locator("[data-setting=text]")
    text.fill("nowhere")
    text.press("Enter")
    alert = explorer.get_by_role("alert").filter(has_text="unknown text 'nowhere'")
    alert.wait_for()
    assert text.input_value() == "docs"
    page.screenshot(path=screenshots / "explorer-error.png")

    explorer.locator("[data-setting=metric]").select_option("knn")
    settle(page, explorer)
    agree(explorer, "knn")
    assert not alert.is_visible()
    for value in ("abc", "9999"):
        field = explorer.locator("[data-setting=k]")
        field.fill(value)
        field.press("Enter")
        explorer.get_by_role("alert").filter(has_text=f"not '{value}'").wait_for()
        assert field.input_value() == "25"


def test_old_numbers_are_dimmed_at_once(page, explorer):
    click = "root => { root.querySelector('[data-setting=first]').click(); return !!root.querySelector('.ed-stale'); }"
    assert explorer.evaluate(click)  # in the same task of the browser, before Python heard of it
    for _ in range(2):  # a refused value, also the same one again, leaves nothing dimmed
        settle(page, explorer)
        explorer.locator("[data-setting=bins]").fill("none")
        explorer.locator("[data-setting=bins]").press("Enter")
        explorer.get_by_role("alert").filter(has_text="not 'none'").wait_for()
    settle(page, explorer)
    assert "without first tokens" in explorer.locator(".ed-title").inner_text()


def test_the_slider_and_the_kind(page, explorer):
    slider = explorer.get_by_role("slider")
    slider.press("End")
    counted(explorer, f"{LAYERS - 3} of {LAYERS} attention layers")
    slider.press("Home")
    counted(explorer, f"0 of {LAYERS} attention layers")
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    counted(explorer, f"2 of {LAYERS} attention layers")
    explorer.locator("[data-setting=kind]").select_option("mlp")
    counted(explorer, f"2 of {LAYERS} MLPs")  # the count stays


def test_an_encoder_is_not_offered_and_says_why(page, explorer):
    options = explorer.locator("datalist[id$=models] option").evaluate_all("all => all.map(one => one.value)")
    assert "smollm2-135m-instruct" in options
    assert "minilm-l6" not in options
    model = explorer.locator("[data-setting=model]")
    model.fill("minilm-l6")
    explorer.locator(".ed-note", has_text="an encoder").wait_for()
    model.fill("gemma-3-270m")
    explorer.locator(".ed-note", has_text="GB of memory").wait_for()
    model.press("Escape")
    assert model.input_value() != "gemma-3-270m"


def test_the_map_by_mouse_and_by_keyboard(page, explorer, screenshots):
    kept = next(i for i in range(LAYERS) if i not in dropped(explorer))
    cell(explorer, kept).click()
    counted(explorer, f"4 of {LAYERS} attention layers")
    assert kept in dropped(explorer)
    assert "dropped by hand" in cell(explorer, kept).get_attribute("aria-label")
    first, last = (cell(explorer, i, "mlp").bounding_box() for i in (3, 6))
    page.mouse.move(first["x"] + 5, first["y"] + 5)
    page.mouse.down()
    page.mouse.move(last["x"] + 5, last["y"] + 5, steps=8)
    page.mouse.up()
    counted(explorer, f"4 of {LAYERS} attention layers and 4 of {LAYERS} MLPs")
    assert dropped(explorer, "mlp") == [3, 4, 5, 6]
    cell(explorer, 8, "mlp").click(modifiers=["Shift"])
    explorer.locator(".ed-cell.ed-out[data-kind=block][data-layer='8']").wait_for()
    page.screenshot(path=screenshots / "explorer-by-hand.png")
    explorer.get_by_role("button", name="Follow the ranking").click()
    explorer.locator(".ed-by-hand").first.wait_for(state="detached")

    before = dropped(explorer)
    cell(explorer, 4).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    explorer.locator(".ed-by-hand[data-layer='5']").wait_for(state="attached")
    assert (5 in dropped(explorer)) != (5 in before)
    assert page.locator(".jp-Notebook.jp-mod-commandMode").count() <= 1
    page.keyboard.press("End")
    assert page.evaluate("() => document.activeElement.dataset.layer") == str(LAYERS - 1)


def test_presets_pins_and_sharing(page, explorer, screenshots):
    explorer.get_by_role("button", name="the paper's 37.5%").click()
    counted(explorer, f"4 of {LAYERS} attention layers")
    settle(page, explorer)
    explorer.get_by_role("button", name="Pin", exact=True).click()
    explorer.get_by_role("button", name="cosine's 37.5%").click()
    explorer.locator(".ed-now th", has_text="now: cosine").wait_for()
    settle(page, explorer)
    agree(explorer, "cosine")
    explorer.get_by_role("button", name="Pin", exact=True).click()
    rows = explorer.locator(".ed-table tbody tr")
    rows.nth(3).wait_for()
    settle(page, explorer)
    assert [row.inner_text().split("\n")[0].strip() for row in rows.locator("th").all()][2:] == ["bucket (bins 20), 4", "cosine, 4"]
    assert rows.nth(2).locator("td").nth(3).inner_text() != "…"  # the repaired loss
    explorer.get_by_role("button", name="the sink's layer").click()
    counted(explorer, "1 of ")
    explorer.get_by_role("button", name="random").click()
    explorer.locator(".ed-now th", has_text="at random (seed").wait_for()
    settle(page, explorer)
    explorer.scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "explorer-pins.png")
    explorer.get_by_role("button", name="unpin cosine, 4").click()
    rows.nth(3).wait_for(state="detached")

    with page.expect_download() as download:
        explorer.get_by_role("button", name="PNG").click()
    download.value.save_as(screenshots / "explorer-shared.png")
    assert (screenshots / "explorer-shared.png").stat().st_size > 10_000
    explorer.get_by_role("button", name="Save…").click()
    explorer.get_by_role("dialog").get_by_text("chosen by at random (seed").wait_for()
    page.keyboard.press("Escape")


def test_the_page_fits_and_stays_in_sight(page, explorer, screenshots):
    """After Run All the explorer is on the screen; no width has a horizontal scroll bar."""
    for width, height in ((1366, 900), (900, 768), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        if width < 700:  # as on a phone: Lab's file list would leave no room
            page.keyboard.press("Control+b")
        page.wait_for_timeout(1500)
        explorer.scroll_into_view_if_needed()
        box = explorer.bounding_box()
        assert -5 <= box["y"] < height, (width, box)
        wide = explorer.evaluate(
            """root => [root, ...root.querySelectorAll('*')].filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1
            && getComputedStyle(e).display !== 'inline' && !e.closest('svg') && !e.matches('input, select'))
            .map(e => `${e.tagName}.${e.className} ${e.scrollWidth} > ${e.clientWidth}`)"""
        )
        assert wide == [], width
        page.screenshot(path=screenshots / f"explorer-{width}.png")
        explorer.screenshot(path=screenshots / f"explorer-{width}-whole.png")
    unnamed = (
        "root => [...root.querySelectorAll('input, select, textarea, button')].filter(e => "
        "!e.closest('label') && !e.getAttribute('aria-label') && !e.textContent.trim()).length"
    )
    assert explorer.evaluate(unnamed) == 0


def test_the_dark_theme_is_readable(page, explorer, screenshots):
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    for name in ("Theme", "JupyterLab Dark"):
        page.locator(".lm-Menu-item", has_text=re.compile(f"^{name}$")).first.click()
    page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
    page.wait_for_timeout(1500)
    page.screenshot(path=screenshots / "explorer-dark.png")
    contrast = explorer.evaluate(
        """root => { const parts = s => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = s;
        c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); };
        const light = s => { const [r, g, b] = parts(s); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const ground = light(getComputedStyle(root).backgroundColor);
        const ratio = colour => { const [low, high] = [light(colour), ground].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05); };
        const of = one => { const style = getComputedStyle(one); return ratio(one.closest('svg') ? style.fill : style.color); };
        const texts = ['.ed-title', '.ed-field > span', '.ed-axis', '.ed-table td', '.ed-table small'];
        return [...texts.map(s => of(root.querySelector(s))), ratio(getComputedStyle(root.querySelector('.ed-cost')).stroke)]; }"""
    )
    assert min(contrast[:-1]) >= 4.5, contrast
    assert contrast[-1] >= 3, contrast  # the colour of what is chosen, in lines


def test_a_second_browser_shows_the_same_kernel(browser, page, explorer):
    other = browser.new_context(viewport={"width": 1366, "height": 900}).new_page()
    other.set_default_timeout(SLOW)
    try:
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2000)
        other.goto(page.url.split("?")[0] + "?token=browser-tests")
        second = other.locator(".jp-NotebookPanel:visible .ed")
        second.locator(".ed-cell").first.wait_for()
        second.get_by_role("slider").press("End")
        for shown in (explorer, second):
            counted(shown, f"{LAYERS - 3} of {LAYERS} attention layers")
    finally:
        other.context.close()


def test_a_gguf_file_that_export_wrote_is_opened(page, explorer, tiny, tmp_path, screenshots):
    """Loss, divergence, perplexity and parameters are those of the model that was exported."""
    numbers = [explorer.locator(".ed-table tbody tr").nth(row).locator("td").all_inner_texts() for row in (0, 1)]
    network, tokenizer = load_model(str(tiny))
    file, before = gguf(network, tmp_path / "opened.gguf", tokenizer, dtype="f32").path, set(MODELS.glob("*opened-*"))
    model = explorer.locator("[data-setting=model]")
    model.fill(str(file))
    explorer.locator(".ed-note", has_text="a GGUF file, converted once").wait_for()
    explorer.get_by_role("button", name="Open", exact=True).click()
    try:
        explorer.locator(".ed-line", has_text=str(file)).wait_for()
        settle(page, explorer)
        assert not explorer.get_by_role("alert").count()  # a hidden one has no role
        assert model.input_value() == str(file)
        for row, expected in enumerate(numbers):
            shown = explorer.locator(".ed-table tbody tr").nth(row).locator("td").all_inner_texts()
            assert [shown[i] for i in (0, 1, 2, 4)] == [expected[i] for i in (0, 1, 2, 4)]
            assert re.search(r"\d", shown[2])
        page.screenshot(path=screenshots / "explorer-gguf.png")
    finally:
        for left in set(MODELS.glob("*opened-*")) - before:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def test_any_host_of_anywidgets_can_show_it(page, tiny, screenshots):
    """The page needs what anywidget promises of its host and no JupyterLab, and takes VS Code's colours where they are."""
    own = Page(Explorer(Profile(model=str(tiny))))
    assert own.background.wait(SLOW / 1000)
    traits = {name: getattr(own.widget, name) for name in ExplorerWidget.class_own_traits(sync=True)}
    own.close()
    page.set_viewport_size({"width": 900, "height": 768})
    page.set_content(
        "<body style='--vscode-editor-background: rgb(30, 30, 30); --vscode-editor-foreground: #cccccc; margin: 0; "
        "--jp-layout-color1: white; --jp-content-font-color1: black'>"  # as VS Code's widget manager has them
        f"<style>{(PACKAGE / 'explorer' / 'explorer.css').read_text()}</style><div id='host'></div></body>"
    )
    page.evaluate(
        """async ([source, traits]) => { window.sent = [];
        const made = await import(URL.createObjectURL(new Blob([source], { type: 'text/javascript' })));
        const model = { get: name => traits[name], on: () => {}, off: () => {}, send: message => window.sent.push(message) };
        made.default.render({ model, el: document.getElementById('host') }); }""",
        [(PACKAGE / "explorer" / "explorer.js").read_text(), traits],
    )
    shown = page.locator(".ed")
    counted(shown, f"3 of {LAYERS} attention layers")
    assert shown.locator(".ed-cell").count() == 3 * LAYERS
    shown.get_by_role("slider").press("End")
    cell(shown, 5, "mlp").click()
    sent = page.evaluate("window.sent")
    assert sent == [{"do": "slide", "n": LAYERS - 3}, {"do": "mark", "sub_blocks": [[5, "mlp"]]}]
    assert shown.evaluate("root => getComputedStyle(root).backgroundColor") == "rgb(30, 30, 30)"
    colours = "root => ['.ed-table tbody td', '.ed-nexts td', '.ed-title'].map(s => getComputedStyle(root.querySelector(s)).color)"
    assert shown.evaluate(colours) == ["rgb(204, 204, 204)"] * 3
    page.screenshot(path=screenshots / "explorer-plain.png")
