"""How objects show themselves: one line in a shell, a small table in a notebook, never their content."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any


class Shown:
    """Gives a class `__repr__` and `_repr_html_` from what its `_facts` say."""

    def _facts(self) -> Mapping[str, Any]:
        """What matters, by name; None and "" are left out. Under "" stands what the object is called."""
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = dict(self._facts())
        title = " ".join(filter(None, [type(self).__name__, _text(facts.pop("", None))]))
        text = ", ".join(f"{name} {_text(value)}" for name, value in facts.items() if value not in (None, ""))
        return f"<{title}: {text}>" if text else f"<{title}>"

    def _repr_html_(self) -> str:
        facts = dict(self._facts())
        title = " ".join(filter(None, [type(self).__name__, _text(facts.pop("", None))]))
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(_text(value))}</td></tr>"
            for name, value in facts.items()
            if value not in (None, "")
        )
        return f"<b>{html.escape(title)}</b><table>{rows}</table>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."
