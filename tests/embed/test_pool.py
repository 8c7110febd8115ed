"""How many processes a cluster gets and what each asks for, on stand-ins for clusters with GPUs."""

import sys
from types import SimpleNamespace

import pytest

from hrvlm.embed.config import EmbedConfig, Resources
from hrvlm.embed.run import _Pool, _remote_probe

# (CPUs, GPUs, device, asked) -> encoders, decoders, writers, CPUs and GPUs of an encoder
CLUSTERS = [
    ((8, 2, "cuda", {}), (2, 8, 4, 0, 1)),
    ((8, 2, "cuda", {"encoders": 1}), (1, 8, 2, 0, 1)),
    ((64, 8, "cuda", {"threads": 3}), (8, 64, 16, 0, 1)),
    ((8, 2, "cpu", {}), (1, 2, 1, 6, 0)),  # --device cpu
    ((8, 0, "cpu", {"encoders": 2}), (2, 2, 2, 3, 0)),
    ((2, 0, "cpu", {}), (1, 1, 1, 0.99, 0)),
    ((1, 0, "cpu", {}), (1, 1, 1, 0, 0)),
]


@pytest.mark.parametrize(("given", "expected"), CLUSTERS)
def test_an_encoder_for_each_gpu_and_cpus_for_the_rest(given, expected, monkeypatch):
    cpus, gpus, device, asked = given
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": cpus} | ({"GPU": gpus} if gpus else {}))
    monkeypatch.setitem(sys.modules, "ray", ray)
    pool = _Pool.of(Resources(**asked), SimpleNamespace(device=device))
    of_one = pool.of_encoder()
    processes = (pool.encoders, pool.decoders, pool.writers)
    assert (*processes, of_one["num_cpus"], of_one["num_gpus"]) == expected


@pytest.mark.parametrize(
    ("gpus", "device", "expected"), [(2, None, 1), (2, "cpu", 0), (0, None, 0), (0.5, None, 0)]
)
def test_the_probe_runs_where_an_encoder_will(gpus, device, expected, monkeypatch):
    asked = []

    class Remote:
        def __init__(self, function):
            self.remote = lambda *arguments: arguments

    def remote(**options):
        asked.append(options)
        return Remote

    ray = SimpleNamespace(
        cluster_resources=lambda: {"CPU": 8, "GPU": gpus},
        remote=remote,
        get=lambda result: result,
        exceptions=SimpleNamespace(RayTaskError=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    config = EmbedConfig("in", "out", device=device)
    *_, dtype, threads = _remote_probe(config, [], None, Resources())
    assert asked == [{"num_gpus": expected}] and dtype is None and threads == 6
