"""The data doctor: one pass over all files of a data set, before training.

`examine` collects the facts of every sample (`facts`), adds them up, and applies rules to them (`findings`). `suggest`
writes the YAML to paste into a config, and `page` reports everything in the terminal and as an HTML page.
"""

from .examine import examine, look_before, median_frequency

__all__ = ["examine", "look_before", "median_frequency"]
