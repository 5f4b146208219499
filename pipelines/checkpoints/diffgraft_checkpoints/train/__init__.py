"""Training of the bundled checkpoints from scratch: `python -m diffgraft_checkpoints.train emoji-sd --out DIR`."""
