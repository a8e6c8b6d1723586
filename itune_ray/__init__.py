"""itune-ray: instruction tuning as one distributed system on Ray."""

__version__ = "0.1.0"
