"""The steps of a run one after the other in this process, without Ray."""

from hrvlm.embed.config import Manifest
from hrvlm.embed.entries import digest_of
from hrvlm.embed.parts import read_parts
from hrvlm.embed.probe import probe, sample_of
from hrvlm.embed.run import begin
from hrvlm.embed.sources import list_images, open_source
from hrvlm.embed.stages import Encoder, Run, decode_part, write_part
from hrvlm.embed.store import Store


def run_here(config, shard=(0, 1), **options):
    """Does the parts of a shard; returns what the steps told."""
    store, entries = Store(config.out), list_images(open_source(config))
    manifest = store.read_manifest()
    if manifest is None:
        facts = probe(config, sample_of(entries, 2)).facts
        rows = config.rows_per_part or len(entries)
        manifest = Manifest.make(config, facts, len(entries), rows, digest_of(entries))
    begin(store, manifest, entries, range(shard[0], manifest.parts, shard[1]))
    run = Run(config, manifest, **options)
    encoder = Encoder(run, threads=1)
    return [
        write_part(encoder(decode_part({"part": part}, run)), run)
        for part in range(shard[0], manifest.parts, shard[1])
    ]


def rows_of(out, *columns):
    """All rows."""
    store = Store(str(out))
    manifest = store.read_manifest()
    return read_parts(store, manifest, list(columns) or ["id", "error", "mean"]).to_pylist()
