"""What keeps an engine, which runs programs of strangers, from everything but computing.

`plan` decides without touching anything, `seccomp` and `landlock` say what the kernel is to be
told, `kernel` has the calls, `confine` makes them in the engine and says which were granted.
The agent asks `python -m services.worker.confinement` what its host would grant.
"""
