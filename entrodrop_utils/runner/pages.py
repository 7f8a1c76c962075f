"""The notebooks as web pages, for reading without Jupyter: ``python -m entrodrop_utils.runner.pages``."""

import html
import re
import shutil

import nbformat
from nbconvert import HTMLExporter
from nbconvert.preprocessors import Preprocessor

from ..paths import BUILD, FIGURES, ROOT
from .checks import available, finding, title

# Pictures and tables fit the screen; code and wide tables scroll by themselves, so the page does not
CSS = """
<style>
body { max-width: 60rem; margin: 0 auto; padding: 0 1rem; box-sizing: border-box; }
body, body > p > a { font-family: system-ui, sans-serif; line-height: 1.5; }
a, a:visited { color: #0b5cad; }
img, svg { max-width: 100%; height: auto; }
body .jp-Cell, body .jp-Notebook { padding-left: 0; padding-right: 0; }
body .jp-InputPrompt, body .jp-OutputPrompt { display: none; }
body .jp-RenderedHTMLCommon { font-size: 1rem; overflow-wrap: anywhere; }
body .jp-RenderedHTMLCommon :is(h1, h2, a) { overflow-wrap: break-word; }
body .jp-OutputArea-output, body .highlight { overflow-x: auto; }
body .jp-RenderedHTMLCommon table { display: block; overflow-x: auto; overflow-wrap: normal; font-size: 0.8rem; }
body pre { font-size: 0.8rem; }
@media (max-width: 40rem) {
  body .jp-RenderedHTMLCommon h1 { font-size: 1.5rem; }
  body .jp-RenderedHTMLCommon h2 { font-size: 1.25rem; line-height: 1.25; }
  body .jp-RenderedHTMLCommon blockquote { margin: 1em 0; padding: 0 0 0 0.75em; }
}
</style>
"""
VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
HEAD = f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{VIEWPORT}'


class LocalLinks(Preprocessor):
    """Points the links of text cells to the pages: notebooks, figures and the README as the index."""

    def preprocess_cell(self, cell, resources, index):
        """The cell with its link targets replaced; code and prose stay as they are."""
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(([\w./-]+)\.ipynb(#[^)]*)?\)", r"](\1.html\2)", cell.source)
            cell.source = cell.source.replace("](../README.md)", "](index.html)").replace("](../figures/", "](figures/")
        return cell, resources


def main() -> int:
    """Write a page for each notebook and an index of them to build/html."""
    folder = BUILD / "html"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    exporter, entries = HTMLExporter(template_name="lab", preprocessors=[LocalLinks]), []
    for path in available():
        notebook = nbformat.read(path, as_version=4)
        page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title(notebook)}})
        back = '<p><a href="index.html">All notebooks</a></p>'
        page = page.replace("</head>", f"{CSS}</head>", 1).replace("<main>", f"{back}<main>", 1)
        (folder / f"{path.stem}.html").write_text(page, encoding="utf-8")
        heading = f'<a href="{path.stem}.html">{html.escape(title(notebook))}</a>'
        entries.append(f"<h2>{heading}</h2><p>{html.escape(finding(notebook))}</p>")
    if FIGURES.exists():
        shutil.copytree(FIGURES, folder / "figures")
    body = f"<h1>EntroDrop notebooks</h1>{''.join(entries)}"
    (folder / "index.html").write_text(
        f"{HEAD}<title>EntroDrop notebooks</title>{CSS}</head><body>{body}</body></html>", encoding="utf-8"
    )
    print(f"{len(entries)} notebooks in {folder.relative_to(ROOT)}: open {(folder / 'index.html').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
