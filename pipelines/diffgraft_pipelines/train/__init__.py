"""Training of the bundled checkpoints from scratch: `python -m diffgraft_pipelines.train emoji-sd --out DIR`."""
