"""How often progress bars are drawn."""

import sys


def pace() -> dict[str, float]:
    """Seconds between two drawings, as options of tqdm: on a terminal fluent, in a log every half minute."""
    seconds = 0.2 if sys.stderr.isatty() else 30
    return {"mininterval": seconds, "maxinterval": max(seconds, 10)}
