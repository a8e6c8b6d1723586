"""Schemas of the filters of `itune curate`, a module per family."""
