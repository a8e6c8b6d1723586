"""Rows, their chat rendering, their storage and their ledger: what every stage shares."""
