"""One self-contained page for a run, or for several laid over each other: curves, completions, recipe, environment.

It reads run directories only, so it works on a run that is going, finished, or killed, on any machine.
"""

from truecourse.report.page import build

__all__ = ["build"]
