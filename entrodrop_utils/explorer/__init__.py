"""The explorer: a page in JupyterLab on which one model is scored, pruned and measured interactively.

``Explorer`` (``state``) holds the settings and the results and knows no widgets; ``choice`` is the selection, ``background`` the
thread for slow work, ``view`` and ``bars`` draw, and ``page`` joins them to widgets. ``show_explorer`` is the entry point.
"""
