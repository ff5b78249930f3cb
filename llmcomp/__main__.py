"""`python -m llmcomp` is the command `llmcomp`."""

import sys

from llmcomp.cli.main import main

sys.exit(main())
