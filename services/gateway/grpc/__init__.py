"""gRPC: the Open Inference Protocol's service and gRPC's health checks, beside HTTP."""

import os

# Read when grpc is imported. Whatever this process starts runs another program at once, so gRPC
# has nothing to prepare for a fork, and need not complain at each that it could not.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
