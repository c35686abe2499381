"""Engines carry tasks to sites and replies back; they compute nothing."""
