"""What the examples on foreign code share: reports as text, without the paths of a machine."""

from __future__ import annotations

import sys
from typing import Any


def printed(report: Any) -> str:
    """The report, with paths relative to where Python finds packages."""
    text = str(report)
    for folder in sorted(filter(None, sys.path), key=len, reverse=True):
        text = text.replace(f"{folder}/", "")
    return text
