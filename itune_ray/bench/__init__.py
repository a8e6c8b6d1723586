"""Measurements of a stage against the library beneath it, in one run on one machine."""
