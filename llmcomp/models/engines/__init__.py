"""What computes logits: exact (C core), cuda (the same bits on a device), torch (any causal model)."""
