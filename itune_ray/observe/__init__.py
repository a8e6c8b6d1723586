"""What a person sees of a running job: progress, logs, timings."""
