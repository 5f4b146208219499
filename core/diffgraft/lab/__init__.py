"""Measuring: what a stack costs and changes, and which stack is worth it."""
