"""Many trials of some settings at once: Ray Tune decides which go on, eval actors on a few engines score them all."""
