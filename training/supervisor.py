"""Watches over a run between its steps: verdicts, signals, clocks and checksums become decisions of all ranks."""
