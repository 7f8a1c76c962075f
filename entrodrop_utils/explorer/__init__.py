"""The explorer: a page in JupyterLab and VS Code on which one model is scored, pruned and measured interactively.

``state`` owns what is shown and the settings that it was computed from (``Session``); ``loaded`` is a model with its results,
``choice`` a ranking and what is dropped, ``drawing`` the values that are drawn, ``background`` the thread for slow work,
``sharing`` what leaves the page, and ``page`` joins them to the widget (``explorer.js``, ``explorer.css``).
``studies.explorer_view`` draws the same without widgets. What is measured comes from ``scoring``, ``evaluation``, ``generation``,
``repairing`` and ``selection``. ``page.show_explorer`` and ``page.explore`` are the entry points.

Tried in JupyterLab 4 (``make test-browser``) and, by hand, in the widget manager that VS Code's Jupyter extension brings
(``@vscode/jupyter-ipywidgets8`` 1.0.9, in Chromium with a real kernel: map, slider, metric, preset, pin); not in VS Code itself.
"""
