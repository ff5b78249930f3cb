"""The command line: main.py parses, commands.py calls the library and prints."""

from llmcomp.cli.main import main

__all__ = ["main"]
