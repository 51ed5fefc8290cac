"""One way to reach Ray: the cluster that the environment names, else a local one."""

from __future__ import annotations

import logging
import os

import ray
import ray.data


def start_ray(*, show_workers: bool = True) -> None:
    """Connect to ``RAY_ADDRESS`` (set inside a submitted job) or start Ray on this machine; once per process.

    Args:
        show_workers: bring what workers print to this process's terminal.
    """
    if ray.is_initialized():
        return
    # Workers import this project from the driver's environment; their lines reach the terminal one by one.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Without "local" Ray would look for a cluster that was once started here, and wait minutes for one that is gone.
    address = None if "RAY_ADDRESS" in os.environ else "local"
    ray.init(address, logging_level=logging.WARNING, log_to_driver=show_workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stages print lines of their own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
