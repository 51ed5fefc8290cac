"""One way to reach Ray: the cluster that the environment names, else a local one."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import ray
import ray.data

from pipelines.errors import heed_sigterm
from pipelines.ray_leftovers import free_leftovers


def start_ray(*, show_workers: bool = True, dashboard: bool = False) -> None:
    """Connect to ``RAY_ADDRESS`` (set inside a submitted job) or start Ray on this machine; once per process.

    Args:
        show_workers: bring what workers print to this process's terminal.
        dashboard: a Ray that is started here has one. It takes a second of the start and a processor for another, but
            Ray Train asks it every second whether a job's controller is alive, and complains where there is none.
    """
    if ray.is_initialized():
        return
    # Workers import this project from the driver's environment; their lines reach the terminal one by one.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Without "local" Ray would look for a cluster that was once started here, and wait minutes for one that is gone.
    address = None if "RAY_ADDRESS" in os.environ else "local"
    own: dict[str, Any] = {} if address is None else {"include_dashboard": dashboard}
    joined = ray.init(address, logging_level=logging.WARNING, log_to_driver=show_workers, **own)
    heed_sigterm()
    # A cluster without a dashboard would not be asked, but whatever else answers where dashboards are.
    if address is None and joined.dashboard_url and (freed := free_leftovers()):
        print(f"gave back what ended jobs had left reserved: {len(freed)} placement groups", file=sys.stderr)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stages print lines of their own
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def processor_share(workers: int) -> int:
    """Processors for each of so many workers: the largest number of which the nodes hold enough; 0 if they do not.

    A worker lies on one node, so it may be less than all processors divided by the workers.
    """
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    shares = range(max(nodes, default=0), 0, -1)
    return next((share for share in shares if sum(node // share for node in nodes) >= workers), 0)
