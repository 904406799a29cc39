"""Executors run ready tasks: in this process, or on Ray Tune."""
