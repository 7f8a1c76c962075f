"""Notebooks run headless, checked, indexed and converted to web pages: `run`, `checks`, `index`, `pages`."""
