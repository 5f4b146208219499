"""Pipeline families as data for diffgraft, and small real checkpoints that run offline."""

__version__ = "0.1.0"
