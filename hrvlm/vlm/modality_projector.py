"""From the encoder's tokens to the language model's: pixel shuffle and a linear layer.

    x[i * s + dy, j * s + dx, c]  ->  shuffled[i, j, (dy * s + dx) * C + c]  ->  @ proj.weight.T

for a rectangular patch grid (hp, wp) with token grid (gh, gw) = (hp // s, wp // s). The order is
nanoVLM's (`models/modality_projector.py`, there for squares).
"""

from __future__ import annotations

from typing import Any, SupportsIndex

from torch import Tensor, nn

from hrvlm_kernels import PackedGrids, layer_norm_pixel_shuffle, pixel_shuffle_linear
from hrvlm_kernels.backends import autocasts, choose_backend
from hrvlm_kernels.ops.layer_norm_pixel_shuffle import MAX_CHANNELS, choose_route
from hrvlm_kernels.ops.pixel_shuffle_linear import compute_dtype

from ..encoder.plain_modules import input_dtype, is_plain, may_be_plain
from ..images.geometry import image_token_count, shuffled_grid
from ..images.patches import check_tensor


def pixel_shuffle(x: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """``[..., hp*wp, C]`` to ``[..., gh*gw, s*s*C]``, in the order at the top of this file.

    Args:
        x: Patches, row by row over the `grid`, without prefix tokens.
        grid: Patch grid (hp, wp).
        factor: s, which divides hp and wp.

    Raises:
        ValueError: the rows do not fill the grid, or the factor does not divide it.
    """
    check_tensor("x", x)
    gh, gw = shuffled_grid(grid, factor)
    (hp, wp), s = grid, factor
    *lead, rows, channels = x.shape
    if rows != hp * wp:
        raise ValueError(f"x has {rows} rows, the patch grid {hp}x{wp} has {hp * wp}")
    blocks = x.reshape(*lead, gh, s, gw, s, channels)
    return blocks.transpose(-4, -3).reshape(*lead, gh * gw, s * s * channels)


def pixel_unshuffle(x: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Inverse of :func:`pixel_shuffle`: ``[..., gh*gw, s*s*C]`` to ``[..., hp*wp, C]``.

    Args:
        x: Shuffled tokens.
        grid: PATCH grid (hp, wp), as for :func:`pixel_shuffle`.
        factor: s, which divides hp and wp.

    Raises:
        ValueError: the rows or channels do not fit.
    """
    check_tensor("x", x)
    gh, gw = shuffled_grid(grid, factor)
    (hp, wp), s = grid, factor
    *lead, rows, size = x.shape
    if rows != gh * gw or size % (s * s):
        raise ValueError(
            f"x is {rows} rows of {size}, expected {gh * gw} rows of a multiple of {s * s} "
            f"for the patch grid {hp}x{wp} and factor {s}"
        )
    blocks = x.reshape(*lead, gh, gw, s, s, size // (s * s))
    return blocks.transpose(-4, -3).reshape(*lead, hp * wp, size // (s * s))


@may_be_plain
class ModalityProjector(nn.Module):
    """Pixel shuffle and projection, for a batch of one grid or for packed images.

    Args:
        config: Whose vit_hidden_dim, lm_hidden_dim, num_prefix_tokens and mp_* options are taken: a
            :class:`~hrvlm.vlm.config.VLMConfig`, or anything with these attributes. Give this, or
            the sizes below.
        vit_hidden_dim: C, channels of the encoder's tokens.
        lm_hidden_dim: Channels of the output.
        mp_pixel_shuffle_factor: s.
        num_prefix_tokens: CLS and registers that precede the patches of each image.
        mp_handle_special_tokens: Whether :meth:`forward` accepts prefix tokens, and drops them.
        mp_append_cls: Whether the CLS token, projected by a layer of its own, follows each image's
            tokens.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.

    Raises:
        TypeError: `config` has no such attributes.
        ValueError: sizes are missing, given twice, or no positive ints.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        vit_hidden_dim: int | None = None,
        lm_hidden_dim: int | None = None,
        mp_pixel_shuffle_factor: int = 4,
        num_prefix_tokens: int = 0,
        mp_handle_special_tokens: bool = True,
        mp_append_cls: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        if config is not None:
            if vit_hidden_dim is not None or lm_hidden_dim is not None:
                raise ValueError("give config, or vit_hidden_dim and lm_hidden_dim, not both")
            names = ("vit_hidden_dim", "lm_hidden_dim", "mp_pixel_shuffle_factor")
            if not all(hasattr(config, name) for name in names):
                raise TypeError(f"config: expected a VLMConfig, got {type(config).__name__}")
            vit_hidden_dim, lm_hidden_dim = config.vit_hidden_dim, config.lm_hidden_dim
            mp_pixel_shuffle_factor = config.mp_pixel_shuffle_factor
            num_prefix_tokens = getattr(config, "num_prefix_tokens", num_prefix_tokens)
            mp_handle_special_tokens = getattr(config, "mp_handle_special_tokens", True)
            mp_append_cls = getattr(config, "mp_append_cls", False)
            backend = getattr(getattr(config, "vision_config", None), "backend", None) or backend
        if vit_hidden_dim is None or lm_hidden_dim is None:
            raise ValueError("give config, or both vit_hidden_dim and lm_hidden_dim")
        self.factor = mp_pixel_shuffle_factor
        self.lm_hidden_dim = lm_hidden_dim
        self.num_prefix_tokens = num_prefix_tokens
        self.handle_special_tokens = mp_handle_special_tokens
        self.backend = backend
        sizes = vit_hidden_dim, lm_hidden_dim, self.factor
        whole = all(isinstance(size, SupportsIndex) for size in (*sizes, num_prefix_tokens))
        if not whole or min(sizes) < 1 or num_prefix_tokens < 0:
            raise ValueError(
                f"vit_hidden_dim={vit_hidden_dim!r}, lm_hidden_dim={lm_hidden_dim!r}, "
                f"factor={self.factor!r}, num_prefix_tokens={num_prefix_tokens!r}: expected "
                "positive sizes"
            )
        if mp_append_cls and not (num_prefix_tokens and mp_handle_special_tokens):
            raise ValueError(
                "mp_append_cls=True needs a CLS token: num_prefix_tokens of at least 1, and "
                "mp_handle_special_tokens=True"
            )
        self.proj = nn.Linear(self.factor**2 * vit_hidden_dim, lm_hidden_dim, bias=False)
        self.cls_proj = (
            nn.Linear(vit_hidden_dim, lm_hidden_dim, bias=False) if mp_append_cls else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from a normal distribution with deviation 0.02, as nanoVLM does."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(
        self,
        x: Tensor,
        gh: int | None = None,
        gw: int | None = None,
        *,
        packed: PackedGrids | None = None,
        norm: nn.Module | None = None,
    ) -> Tensor:
        """Project a batch of images of one size, or with `packed` images of any sizes.

        Careful: `gh` and `gw` are the PATCH grid of the image that goes in, not the token grid that
        comes out. A 640x960 image with patches of 16 is ``gh=40, gw=60``, and with factor 4 it
        becomes 10 x 15 tokens.

        Args:
            x: ``[B, n, C]`` patches, or ``[B, P + n, C]`` with the P prefix tokens in front; with
                `packed`, ``[T, C]`` and the prefix tokens that it says.
            gh: PATCHES down.
            gw: PATCHES across. Without both, the image is taken to be square.
            packed: Layout of images packed one after the other, of PATCH grids.
            norm: The encoder's last norm, if `x` is from before it (with `packed` only).

        Returns:
            ``[B, n / s**2, N]`` tokens row by row over the token grid; one more, the CLS, at the
            end with ``mp_append_cls``. With `packed` ``[sum of tokens, N]``, image after image.

        Raises:
            TypeError: `x` is no tensor, or `packed` no layout.
            ValueError: the rows do not fit the grid (a token grid given by mistake is recognised),
                the factor does not divide it (the image is named), or the CLS is asked for where
                there are no prefix tokens.
        """
        check_tensor("x", x)
        if packed is not None:
            if not isinstance(packed, PackedGrids):
                raise TypeError(f"packed: expected PackedGrids, got {type(packed).__name__}")
            if gh is not None or gw is not None:
                raise ValueError("give gh and gw, or packed, not both")
            return self._project(x, packed, norm)
        if norm is not None:
            raise ValueError("norm goes with packed")
        if x.ndim != 3:
            raise ValueError(f"x must be [B, n, C] without packed, got {tuple(x.shape)}")
        if (gh is None) != (gw is None):
            raise ValueError(f"give gh and gw both, or neither: got gh={gh}, gw={gw}")
        if gh is None or gw is None:
            gh = gw = self._square_side(x.shape[1])
        prefix = self._prefix_of(x.shape[1], gh, gw)
        same = PackedGrids.from_grids(
            [(gh, gw)] * x.shape[0], num_prefix_tokens=prefix, device=x.device
        )
        tokens = self._project(x.flatten(0, 1), same)
        per_image = image_token_count((gh, gw), self.factor, self.cls_proj is not None)
        return tokens.view(x.shape[0], per_image, tokens.shape[1])

    def takes_norm(self, norm: Any) -> bool:
        """Whether it would apply the encoder's last norm while it shuffles, in one kernel.

        So it is on the Triton backend where
        :func:`~hrvlm_kernels.ops.layer_norm_pixel_shuffle.choose_route` says that this is better
        than to shuffle while multiplying; and if the norm is called in no other way.
        """
        weight = getattr(norm, "weight", None)
        return (
            is_plain(norm, nn.LayerNorm)
            and is_plain(self, ModalityProjector)
            and weight is not None
            and weight.shape[0] <= MAX_CHANNELS
            and choose_route(self.lm_hidden_dim, weight.shape[0]) == "layernorm_gemm"
            and choose_backend("layer_norm_pixel_shuffle", self.backend, weight) == "triton"
        )

    def _project(self, x: Tensor, packed: PackedGrids, norm: nn.Module | None = None) -> Tensor:
        packed.check_rows(x, "x")
        if norm is not None and self.takes_norm(norm):
            return self._normed_and_projected(x, packed, norm)
        return self._projected(x if norm is None else norm(x), packed)

    def _normed_and_projected(self, x: Tensor, packed: PackedGrids, norm: Any) -> Tensor:
        dtype = compute_dtype(x) if autocasts(x) else input_dtype(self.proj, x)
        rows = layer_norm_pixel_shuffle(
            x,
            packed,
            self.factor,
            norm.weight,
            norm.bias,
            norm.eps,
            dtype=dtype,
            backend=self.backend,
        )
        tokens = self.proj(rows)
        return tokens if self.cls_proj is None else self._with_cls(tokens, x, packed, norm)

    def _projected(self, x: Tensor, packed: PackedGrids) -> Tensor:
        patches = _as_input(self.proj, x)
        if is_plain(self.proj, nn.Linear):
            tokens = pixel_shuffle_linear(
                patches,
                packed,
                self.factor,
                self.proj.weight,
                self.proj.bias,
                backend=self.backend,
            )
        else:
            tokens = self.proj(patches[packed.shuffle_index(self.factor).long()].flatten(1))
        return tokens if self.cls_proj is None else self._with_cls(tokens, x, packed)

    def _with_cls(self, tokens: Tensor, x: Tensor, packed: PackedGrids, norm: Any = None) -> Tensor:
        """The projected CLS of each image after its tokens."""
        if not packed.num_prefix_tokens:
            raise ValueError("packed has no prefix tokens, and mp_append_cls needs the CLS token")
        cls = x[packed.cu_seqlens[:-1].long()]
        cls = cls if norm is None else norm(cls)
        cls = self.cls_proj(_as_input(self.cls_proj, cls))  # type: ignore[misc, arg-type]
        # In this layout each image has one token more, in front; here it goes to the end.
        longer = PackedGrids.from_grids(
            packed.token_grids(self.factor), num_prefix_tokens=1, device=x.device
        )
        out = tokens.new_zeros(longer.total_tokens, tokens.shape[1])
        out = out.index_copy(0, longer.patch_rows().long() - 1, tokens)
        return out.index_copy(0, longer.cu_seqlens[1:].long() - 1, cls.to(tokens.dtype))

    def _prefix_of(self, rows: int, gh: int, gw: int) -> int:
        """The prefix tokens among `rows`, which have to fit the patch grid."""
        patches, s = gh * gw, self.factor
        prefix = self.num_prefix_tokens if self.handle_special_tokens else 0
        if self.cls_proj is None and rows == patches:
            return 0
        if rows == patches + prefix:
            return prefix
        either = f"{patches} or {prefix} + {patches}" if prefix else f"{patches}"
        message = f"x has {rows} rows an image, the patch grid gh={gh}, gw={gw} has {either}"
        if rows - patches * s * s in (0, prefix, self.num_prefix_tokens):
            raise ValueError(
                f"{message}: you passed the token grid; expected the patch grid "
                f"gh={gh * s}, gw={gw * s}"
            )
        if rows == patches + self.num_prefix_tokens:
            message += "; it has prefix tokens, and mp_handle_special_tokens is False"
        raise ValueError(message)

    def _square_side(self, rows: int) -> int:
        """Side of the square grid that `rows` rows make, with or without prefix tokens."""
        prefix = self.num_prefix_tokens if self.handle_special_tokens else 0
        counts = {rows - prefix} if self.cls_proj is not None else {rows - prefix, rows}
        sides = {round(n**0.5) for n in counts if n > 0 and round(n**0.5) ** 2 == n}
        fitting = {side for side in sides if side % self.factor == 0}
        if len(fitting) != 1:
            what = "is read as more than one square" if fitting else "is not a square"
            raise ValueError(
                f"x has {rows} rows an image, which {what} that the factor {self.factor} divides "
                f"({prefix} prefix tokens or none): pass the patch grid gh, gw"
            )
        return fitting.pop()

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return f"factor={self.factor}, num_prefix_tokens={self.num_prefix_tokens}"


def _as_input(module: nn.Module, x: Tensor) -> Tensor:
    """`x` in the dtype that `module` is to be given; under autocast the module's call casts."""
    if autocasts(x):
        return x
    return x.to(input_dtype(module, x))
