"""The shared state as a port (`port`), Redis behind it (`redis`), and a twin in memory.

Everything in it can be rebuilt: reports come again with the next heartbeat, assignments with
the next tick. Flushing it loses no registration and no request.
"""
