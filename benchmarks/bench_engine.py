"""The exact engine beside torch + transformers: `llmcomp bench engine` under the name that its siblings have here.

python benchmarks/bench_engine.py [--threads 1 2] [--shapes 70m 160m pico] [--engine exact-int8] [--clock cpu] [--json]
"""

import sys

from llmcomp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "engine", *sys.argv[1:]]))
