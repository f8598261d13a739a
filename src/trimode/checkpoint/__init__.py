"""Weights on disk: reading, checking and writing checkpoint folders."""
