"""Named bytes (data sets, downloads), and bytes <-> tokens (tokenizers, mappings). No models, no coder."""
