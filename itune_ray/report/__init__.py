"""The report of a run: one self-contained page, one table, one summary."""
