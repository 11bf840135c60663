"""Interchange: one file per foreign format."""
