"""Simulator: the placer's and the worker's own cores, in virtual time."""
