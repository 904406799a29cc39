"""Runs tasks on Ray: lanes are Tune trials that drain tasks. The only package that imports ray.

Nothing is imported here: nodes that only answer a question do not load Tune.
"""
