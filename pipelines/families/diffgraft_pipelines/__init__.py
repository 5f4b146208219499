"""Pipeline families as data for diffgraft (`families`), and a tiny seeded pipeline of every class (`tiny`)."""

__version__ = "0.1.0"
