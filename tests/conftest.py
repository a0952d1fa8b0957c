"""One Prefect server for all tests that run a flow, and small real models to run it on."""

import os

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")

import flows  # noqa: F401  (Prefect's defaults, before anything imports Prefect)
