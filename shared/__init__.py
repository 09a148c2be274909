"""Contracts that gateway, placer and worker share. Nothing in here imports torch."""
