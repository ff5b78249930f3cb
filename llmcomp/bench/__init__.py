"""`llmcomp bench`: what this machine does, beside a peer in the same run."""
