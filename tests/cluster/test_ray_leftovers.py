"""A head that died a moment after one of its jobs does not give back what the job had reserved; the next job does.

The moment is some milliseconds long, so it is made: the machine dies at once, and the death of the job, which the head
would have recorded in that moment, is written into the Redis where it would stand.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from hosts import BRIDGE_ADDRESS, Hosts, two_hosts
from processes import kill_tree
from ray_head import BIN, plain_environment
from servers.redis import redis_server
from waiting import wait_until

DRIVER = """
import sys, time, ray
from ray.util import placement_group
ray.init(logging_level="ERROR", log_to_driver=False)

@ray.remote(num_cpus=0)
class Controller:
    def reserve(self, **how):
        self.group = placement_group([{"CPU": 1}], **how)
        ray.get(self.group.ready())

controller = Controller.remote()
ray.get(controller.reserve.remote())
if sys.argv[1] == "dying":
    ray.get(controller.reserve.remote(lifetime="detached", name="kept"))
print("reserved by the", sys.argv[1], flush=True)
time.sleep(600)
"""
FREE = """
import ray
from pipelines.ray_leftovers import free_leftovers
ray.init(logging_level="ERROR")
print(len(free_leftovers()), "freed")
"""


def test_what_a_forgotten_job_has_reserved_is_given_back(tmp_path: Path) -> None:
    environment = {**plain_environment(tmp_path), "RAY_AUTH_TOKEN": "token-of-the-forgetful"}
    with two_hosts(tmp_path, environment) as hosts, redis_server(tmp_path, BRIDGE_ADDRESS) as redis:
        hosts.keep_state_in(redis)
        hosts.processors, hosts.apart = (3, 0), True
        machine = hosts.hosts[0]
        head = hosts.start_ray(machine)
        hosts.wait_for_nodes(1)
        dying = start_driver(hosts, "dying")
        # A head that outlives the driver by milliseconds would give back what it had reserved.
        for process in (head, dying):
            kill_tree(process)
        redis.record_death_of_jobs()
        hosts.restart_head()
        hosts.wait_for_nodes(1)
        start_driver(hosts, "living")
        # Should this fail one day, Ray has learned it, and pipelines/ray_leftovers.py can go.
        wait_until(lambda: reserved(hosts) == 3, words=hosts.status)
        assert hosts.ask_head(FREE).stdout == "1 freed\n"
        wait_until(lambda: reserved(hosts) == 2, words=hosts.status)
        assert hosts.ask_head(FREE).stdout == "0 freed\n"  # neither what is detached nor what a living job uses


def start_driver(hosts: Hosts, name: str) -> subprocess.Popen[bytes]:
    log = hosts.folder / f"{name}.log"
    process = hosts.hosts[0].start([BIN / "python", "-c", DRIVER, name], hosts.environment, log)
    wait_until(lambda: "reserved" in log.read_text(), process, log.read_text)
    return process


def reserved(hosts: Hosts) -> float:
    """Processors in placement groups."""
    found = re.search(r"of ([0-9.]+) reserved", hosts.status())
    return float(found[1]) if found else 0.0
