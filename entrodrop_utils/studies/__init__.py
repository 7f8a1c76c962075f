"""The studies of the numbered notebooks: functions that measure and return tidy tables, and figures that take more than a cell.

One module per study; a notebook holds the question, the order of the argument and what the numbers mean. ``methods`` is shared: it
names the pruning methods that several notebooks compare.
"""
