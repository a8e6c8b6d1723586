"""Models: loading, adapters, per-token scores, merging and export."""
