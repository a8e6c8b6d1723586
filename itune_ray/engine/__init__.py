"""Engines that generate text, and the pool that holds their replicas."""
