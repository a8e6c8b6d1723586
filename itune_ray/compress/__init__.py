"""Smaller models that transformers and vLLM open without custom code."""
