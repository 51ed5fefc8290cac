"""What a job that died with the head leaves reserved in a cluster.

A head that comes back on its Redis can forget a placement group: where it recorded a job's death milliseconds before
its own, it waits from then on for the death of an actor that it no longer knows (Ray 2.60). The processors and GPUs in
the group would stay reserved for as long as the cluster lives, and a resumed job would wait for them.
"""

from __future__ import annotations

import ray
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.state import list_actors, list_jobs, list_placement_groups
from ray.util.state.exception import RayStateApiException

ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}
ANSWER_S = 10  # for one list; the job does not wait longer for what is no part of it


def free_leftovers() -> list[str]:
    """Remove the placement groups that nothing alive can use: not detached, their job has ended, no actor of it lives.

    Ray removes those by itself, but for the case above.

    Returns:
        Their ids; none where the cluster does not say what it has (no dashboard in reach).
    """
    try:
        found = leftovers()
    except (RayStateApiException, ConnectionError, ValueError):
        return []
    for group in found:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))
    return found


def leftovers() -> list[str]:
    """Ids of placement groups that nothing alive can use.

    Raises:
        RayStateApiException: the cluster's state cannot be had, or not all of it.
    """
    groups = list_placement_groups(filters=[("state", "!=", "REMOVED")], detail=True, timeout=ANSWER_S)
    if not groups:
        return []
    ended = {job.job_id for job in list_jobs(timeout=ANSWER_S) if job.status in ENDED}
    return [
        group.placement_group_id for group in groups
        if not group.is_detached and group.creator_job_id in ended and not _has_actors(group.creator_job_id)
    ]  # fmt: skip


def _has_actors(job_id: str) -> bool:
    return bool(list_actors(filters=[("job_id", "=", job_id), ("state", "!=", "DEAD")], limit=1, timeout=ANSWER_S))
