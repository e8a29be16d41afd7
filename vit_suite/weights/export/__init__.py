"""Backbones for other programs: one format a row of `formats.py`, each checked against this suite's own numbers."""
