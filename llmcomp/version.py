"""The one version number, which stands in pyproject.toml."""

from importlib import metadata

__version__ = metadata.version("llmcomp")
