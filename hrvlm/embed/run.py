"""A run: what there is to do, a probe, the pipeline on Ray Data, and whether all rows are there.

    parts that are missing -> decode (tasks) -> encode (actors) -> write (actors)

Ray Data moves the parts, restarts what dies, and holds back the decoding where the encoders are
busy. A part whose tasks die every time is done once more with care: each image decoded in a process
of its own and encoded alone, so that the one that kills a decoder becomes a row with an error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .config import EmbedConfig, Manifest, Resources, default_rows_per_part, need_extra
from .entries import Entry, digest_of
from .parts import done_parts
from .probe import Probed, probe, sample_of
from .report import EmbedPlan, EmbedReport
from .rows import add_errors, listing_bytes
from .sources import list_images, open_source
from .stages import Encoder, Run, Writer, decode_part
from .store import LISTING, MANIFEST, Store, part_name
from .tries import Tries


def embed(
    config: EmbedConfig,
    resources: Resources | None = None,
    *,
    on_plan: Callable[[EmbedPlan], bool] | None = None,
    on_images: Callable[[int], None] | None = None,
    retry_bad: bool = False,
) -> EmbedReport:
    """Write a row for every image of the input that has none yet.

    Args:
        config: What is embedded.
        resources: Where.
        on_plan: Told the plan; False ends here, with nothing written.
        on_images: Told how many images more are done, as they are.
        retry_bad: Do the parts again that have rows with errors.

    Raises:
        ValueError: the input has no images, the folder holds rows of another run (what differs is
            named) or gets them meanwhile, or the model can't be loaded.
        OSError: the folder can't be written.
    """
    need_extra("ray", "pyarrow")
    resources = resources or Resources()
    source, store = open_source(config), Store(config.out)
    entries = list_images(source)
    if not entries:
        raise ValueError(f"{config.input}: no images")
    digest, manifest = digest_of(entries), store.read_manifest()
    if manifest is not None:
        manifest.check_goes_on(config, len(entries), digest)
        todo = waiting(store, manifest, resources, retry_bad=retry_bad)
        if not todo:
            _remove_leftovers(store, resources.own(manifest.parts))
            return _report(config, store, manifest, resources, _Progress(), None)
    with _ray(resources):
        sample = sample_of(entries)
        probed = _remote_probe(config, sample, manifest, resources)
        if manifest is None:
            manifest = _new_manifest(config, probed, entries, digest)
            todo = waiting(store, manifest, resources, retry_bad=False)
        else:
            manifest.check_goes_on(config, len(entries), digest, probed.facts)
        pool = _Pool.of(resources, probed)
        plan = _plan(manifest, todo, probed, pool, source.left_out)
        if on_plan is not None and not on_plan(plan):
            return EmbedReport(config.out, len(entries), plan=plan)
        begin(store, manifest, entries, resources.own(manifest.parts))
        progress = _Progress(on_images)
        _pipeline(Run(config, manifest), todo, pool, progress)
        if left := sorted(set(todo) - progress.done):
            logging.getLogger(__name__).warning("%d parts once more, with care", len(left))
            _pipeline(Run(config, manifest, careful=True), left, pool, progress)
    _remove_leftovers(store, resources.own(manifest.parts))
    return _report(config, store, manifest, resources, progress, plan)


def begin(store: Store, manifest: Manifest, entries: Sequence[Entry], own: Sequence[int]) -> None:
    """Make the folder ready: listing and manifest are there, what killed runs have left is not.

    Raises:
        ValueError: another run has begun here, too.
        OSError: the folder can't be written.
    """
    is_first = store.read_manifest() is None
    if not is_first:
        _check_alone(store, manifest)
    listing = listing_bytes(entries, manifest)
    if store.read(LISTING) != listing:  # or damaged, or removed
        store.write(LISTING, listing)
    if is_first:
        store.write_manifest(manifest)
        _check_alone(store, manifest)
    _remove_leftovers(store, own)


def _remove_leftovers(store: Store, own: Sequence[int]) -> None:
    store.remove_leftovers({MANIFEST, LISTING, *map(part_name, own)})


def _check_alone(store: Store, manifest: Manifest) -> None:
    there = store.read_manifest()
    if there is None or there.fingerprint != manifest.fingerprint:
        raise ValueError(
            f"{store.address}: another run, of another model, input or options, has begun here "
            "meanwhile: give one of them another --out"
        )


def waiting(
    store: Store, manifest: Manifest, resources: Resources, *, retry_bad: bool
) -> list[int]:
    """The parts of the shard that are not there, or not whole."""
    own = resources.own(manifest.parts)
    done = done_parts(store, manifest, own)
    return [part for part in own if part not in done or (retry_bad and done[part].bad)]


def _new_manifest(
    config: EmbedConfig, probed: Probed, entries: Sequence[Entry], digest: str
) -> Manifest:
    rows = config.rows_per_part or default_rows_per_part(probed.pixel_bytes, probed.row_bytes)
    return Manifest.make(config, probed.facts, len(entries), rows, digest)


def _plan(
    manifest: Manifest, todo: Sequence[int], probed: Probed, pool: _Pool, left_out: Sequence[str]
) -> EmbedPlan:
    waiting = sum(manifest.rows_of(part) for part in todo)
    tokens = waiting * probed.tokens
    seconds = None
    if probed.tokens_per_second:
        encoding = tokens / (probed.tokens_per_second * pool.encoders)
        seconds = max(encoding, waiting * probed.decode_seconds / max(1, pool.decoders))
    return EmbedPlan(
        manifest.images,
        waiting,
        len(todo),
        left_out,
        round(tokens),
        round(waiting * probed.row_bytes),
        seconds,
        pool.encoders,
        probed,
        manifest,
    )


@dataclass(frozen=True)
class _Pool:
    """Processes that encode, and what each of them takes of the cluster."""

    encoders: int
    gpus: int
    threads: int
    decoders: int

    @classmethod
    def of(cls, resources: Resources, probed: Probed) -> _Pool:
        import ray

        total = ray.cluster_resources()
        cpus = max(1, int(total.get("CPU", 1)))
        gpu = probed.device != "cpu"
        encoders = resources.encoders or (max(1, int(total.get("GPU", 1))) if gpu else 1)
        threads = 0 if gpu else _threads(resources, cpus, encoders)
        return cls(encoders, int(gpu), threads, max(1, cpus - encoders * threads))

    @property
    def writers(self) -> int:
        """Processes that write; two beside a GPU, which may be faster than an upload."""
        return self.encoders * (2 if self.gpus else 1)

    def of_encoder(self) -> dict[str, Any]:
        """What Ray is asked for; on one CPU, which the decoding needs too, nothing.

        Never what a decoding task asks for: Ray Data runs steps that ask for the same in one
        process, one after the other.
        """
        import ray

        one = ray.cluster_resources().get("CPU", 1) < 2
        cpus = 0 if one else self.threads if self.threads > 1 or self.gpus else 0.99
        return {"num_gpus": self.gpus, "num_cpus": cpus}


def _threads(resources: Resources, cpus: int, encoders: int) -> int:
    """Of an encoder on the CPU."""
    return resources.threads or max(1, cpus * 3 // 4 // encoders)


class _Progress:
    """What the parts tell as they are done."""

    def __init__(self, on_images: Callable[[int], None] | None = None):
        self._on_images = on_images
        self.told: list[dict[str, Any]] = []

    @property
    def done(self) -> set[int]:
        return {told["part"] for told in self.told}

    def add(self, told: dict[str, Any], out: str) -> None:
        """Count a part.

        Raises:
            OSError: it could not be written.
        """
        if "died" in told:
            return
        if "failed" in told:
            raise OSError(f"{out}: {told['failed']}")
        self.told.append(told)
        if self._on_images:
            self._on_images(told["images"])

    def busy(self) -> float | None:
        """The encoders' share of the time from their first part to their last."""
        shares = []
        for worker in {told["worker"] for told in self.told}:
            own = [told for told in self.told if told["worker"] == worker]
            whole = max(t["ended"] for t in own) - min(t["started"] for t in own)
            if whole > 0:
                shares.append(sum(t["ended"] - t["started"] for t in own) / whole)
        return sum(shares) / len(shares) if shares else None


def _pipeline(run: Run, parts: Sequence[int], pool: _Pool, progress: _Progress) -> None:
    """Ray Data's part of it: a row for each part, through the three steps."""
    if not parts:
        return
    import ray.data

    decode: Any = decode_part
    encode: Any = Encoder
    write: Any = Writer
    run = replace(run, tries=ray.remote(num_cpus=0)(Tries).remote())
    with _data_context():
        rows = ray.data.from_items([{"part": p} for p in parts], override_num_blocks=len(parts))
        done = (
            rows.map(decode, fn_kwargs={"run": run})
            .map(
                encode,
                fn_constructor_kwargs={"run": run, "threads": pool.threads},
                compute=ray.data.ActorPoolStrategy(size=min(pool.encoders, len(parts))),
                **pool.of_encoder(),
            )
            .map(
                write,
                fn_constructor_kwargs={"run": run},
                # No CPU is counted for these: with all of them decoding, they would wait for the
                # end. And no tasks: Ray would start a process for each.
                compute=ray.data.ActorPoolStrategy(size=pool.writers),
                num_cpus=0,
            )
        )
        for row in done.iter_rows():
            progress.add(json.loads(row["told"]), run.config.out)


@contextlib.contextmanager
def _data_context() -> Iterator[None]:
    """Ray Data without its own bars and log."""
    from ray.data import DataContext

    context = DataContext.get_current()
    wanted = {"enable_progress_bars": False, "print_on_execution_start": False}
    before = {name: getattr(context, name) for name in wanted}
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)


@contextlib.contextmanager
def _ray(resources: Resources) -> Iterator[None]:
    """Ray, started or joined unless this process has it already."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report home
    own = of_one_machine(resources) if resources.address is None else {}
    import ray

    if ray.is_initialized():
        yield
        return
    address = resources.address or "local"
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except ConnectionError as error:
        raise ValueError(f"--address {resources.address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def of_one_machine(resources: Resources) -> dict[str, Any]:
    """What ``ray.init("local")`` takes; to be called before Ray is imported.

    Whoever reaches a process of Ray can have it run anything. This switch of Ray's, which it reads
    as it is imported, has all of them listen to this machine alone, as on other systems.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    own: dict[str, Any] = {"num_cpus": resources.cpus, "include_dashboard": False}
    own["object_store_memory"] = resources.object_store_bytes
    return own


def _remote_probe(
    config: EmbedConfig, sample: Sequence[Entry], manifest: Manifest | None, resources: Resources
) -> Probed:
    """The probe, where an encoder will run."""
    import ray

    total = ray.cluster_resources()
    gpu = config.device != "cpu" and total.get("GPU", 0) >= 1
    dtype = manifest.facts.dtype if manifest else config.dtype
    threads = _threads(resources, int(total.get("CPU", 1)), resources.encoders or 1)
    remote: Any = ray.remote(num_gpus=int(gpu))(probe)
    try:
        result: Probed = ray.get(remote.remote(config, sample, dtype, threads))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return result


def _report(
    config: EmbedConfig,
    store: Store,
    manifest: Manifest,
    resources: Resources,
    progress: _Progress,
    plan: EmbedPlan | None,
) -> EmbedReport:
    """Count what is there, by what each part says of itself."""
    own = resources.own(manifest.parts)
    _check_alone(store, manifest)
    done = done_parts(store, manifest, own)
    report = EmbedReport(config.out, sum(map(manifest.rows_of, own)), plan=plan)
    report.failed = [part for part in own if part not in done]
    report.parts = len(done)
    for part in done.values():
        report.rows += part.rows
        report.bytes += part.size
        add_errors(report.bad, part.bad)
    told = progress.told
    report.written = sum(t["images"] for t in told)
    report.tokens = sum(t["tokens"] for t in told)
    if told:
        report.seconds = max(t["ended"] for t in told) - min(t["started"] for t in told)
        report.busy = progress.busy()
    return report
