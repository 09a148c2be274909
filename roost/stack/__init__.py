"""A whole Roost on this machine: as processes over private RabbitMQ and Redis (`processes`), or
in one process over their twins in memory (`embedded`). `roost up`, the demo and the end-to-end
tests run the same stack.
"""
