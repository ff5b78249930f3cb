"""x"""

from typing import Any


class Plan: ...


def plan_cells(law: Any, budget: float, **o: Any) -> Plan: ...
