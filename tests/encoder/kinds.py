"""Encoders of both families, in eager and on the kernels, for what has to hold in all of them."""

from tests.encoder import dinov2_models, encoders

# A model of transformers, ours with its weights, and the backend of ours.
KINDS = {
    "dinov3": (encoders.pair_of, "vit", "auto"),
    "dinov2": (dinov2_models.pair_of, "plain", "auto"),
    "dinov2 registers": (dinov2_models.pair_of, "registers", "auto"),
    "dinov3 on the kernels": (encoders.pair_of, "vit", "triton"),
    "dinov2 on the kernels": (dinov2_models.pair_of, "registers", "triton"),
}
OTHERS = tuple(kind for kind in KINDS if kind != "dinov3")
ON_KERNELS = tuple(kind for kind in KINDS if "kernels" in kind)


def pair_of(kind, seed=0, **changes):
    """Transformers' model and ours, with patches of 16 and equal random weights."""
    make, name, backend = KINDS[kind]
    if make is dinov2_models.pair_of:
        changes = {"patch_size": 16, "image_size": 64} | changes
        if inner := changes.pop("intermediate_size", None):
            changes["mlp_ratio"] = inner // changes.get("hidden_size", 64)
    theirs, ours = make(name, seed, **changes)
    ours.backend = backend
    return theirs, ours
