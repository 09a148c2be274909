"""An HTTP server inside a running event loop: uvicorn without its signals, with what it lacks
against slow and greedy clients. Only HTTP services import this (it needs their extras)."""

from shared.http.server import serve

__all__ = ["serve"]
