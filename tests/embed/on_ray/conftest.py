"""One Ray cluster for the run; see own_process.py for how these files run."""

import os

import pytest

from hrvlm.embed.config import Resources
from hrvlm.embed.run import of_one_machine

CPUS, STORE_BYTES = 2, 100 << 20
# A file in this folder is a process of its own, which is worth it only where it does something.
collect_ignore = [] if "HRVLM_SCALE" in os.environ else ["test_kills.py"]


@pytest.fixture(scope="session")
def cluster():
    """Its address."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # where other tests have the CPUs
    own = of_one_machine(Resources(cpus=CPUS, object_store_bytes=STORE_BYTES))
    import ray

    context = ray.init(
        "local",
        **own,
        log_to_driver=False,
        _system_config={"worker_niceness": 0},  # by default 15, on machines that others use too
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
