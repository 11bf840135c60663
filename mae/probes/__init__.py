"""Probes of a frozen encoder, each with its settings, what it needs and what it measures."""
