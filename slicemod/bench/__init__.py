"""Measuring: what attention costs in memory and time on this machine."""
