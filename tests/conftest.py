"""Settings of the test process itself, before anything is imported."""

from __future__ import annotations

import os

from hypothesis import settings

# p2p daemons are started with exec: gRPC's warnings about the fork before it say nothing, once per daemon
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

settings.register_profile("no-clock", deadline=None)  # an example's time is the machine's, not the code's
settings.load_profile("no-clock")
