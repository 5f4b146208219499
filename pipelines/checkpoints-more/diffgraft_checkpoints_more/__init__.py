"""More small real checkpoints that run offline, for diffgraft."""

__version__ = "0.1.0"
