"""The three services: gateway, placer, worker."""
