"""`python -m llmcomp` is the command `llmcomp`."""

import sys

from llmcomp.cli import main

sys.exit(main())
