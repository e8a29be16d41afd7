"""Schedules, parameter groups and gradient clipping."""
