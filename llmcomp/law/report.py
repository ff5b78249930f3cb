"""x"""

from typing import Any


def report_of(law: Any, format: str) -> str:
    return ""
