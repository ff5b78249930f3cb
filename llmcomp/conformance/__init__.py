"""Whether this machine computes the bits that all others do: `llmcomp selftest` and the rows of CONFORMANCE.md.

inputs.py has the numbers, cases.py what is computed from them, selftest.py the comparison with digests.json.
"""
