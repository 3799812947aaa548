"""Backends: one folder for each kind of machine, all implementing backends/contract.py."""
