"""The curate stage: unite sources, filter them, and account for every row."""
