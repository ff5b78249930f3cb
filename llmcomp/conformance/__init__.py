"""Whether this machine computes the bits that all others do: `llmcomp selftest` and the rows of CONFORMANCE.md."""

from llmcomp.conformance.selftest import Outcome, Place, places, selftest

__all__ = ["Outcome", "Place", "places", "selftest"]
