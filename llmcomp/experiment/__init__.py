"""Grids of models x checkpoints x data: plan, sweep, demo."""
