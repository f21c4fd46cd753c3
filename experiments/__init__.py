"""Longer experiments, each a folder of scripts run with `python -m`."""
