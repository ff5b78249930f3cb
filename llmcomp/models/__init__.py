"""Models: names, checkpoints, the hub, load_model and the engines. Knows data; does not know archives or rows."""
