"""Runs containers from a Redis queue: once, traced, and with an answer."""

__version__ = "0.1.0"
