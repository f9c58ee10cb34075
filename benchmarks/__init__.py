"""Measurements of time and memory. The docstring of each script has its command and its output."""
