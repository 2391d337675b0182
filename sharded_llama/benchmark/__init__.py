"""Measuring the engine: workloads, runs over them, what the devices could do at best, and other engines beside it."""
