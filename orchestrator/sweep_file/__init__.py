"""Sweep files: YAML → SweepFile, with every error at once."""

from orchestrator.sweep_file.load import load_sweep
from orchestrator.sweep_issues import SweepIssue
from orchestrator.sweep_settings import SweepFile

__all__ = ["SweepFile", "SweepIssue", "load_sweep"]
