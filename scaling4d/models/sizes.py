"""The table of model sizes.

Responsible for: width, blocks, MLP width and heads of every named size. Not responsible for: clips, patches or the
masked auto-encoder's extra tokens (see ``video_mae.py``). S to e follow the released 4DS family, which uses the ViT
shapes of Zhai et al., "Scaling Vision Transformers" (arXiv 2106.04560); j (21.5 billion) is the one shape that fits
its published parameter count, its number of heads is inferred (128 channels a head). ``Ti`` is that family's next
smaller member and ``tiny`` is ours, for two CPU cores.
"""

import dataclasses
import difflib

from scaling4d.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """The shape of a stack of transformer blocks."""

    name: str
    width: int
    layers: int
    mlp: int
    heads: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


SIZES: dict[str, ModelSize] = {
    size.name: size
    for size in (
        ModelSize("tiny", 128, 6, 512, 8),
        ModelSize("Ti", 192, 12, 768, 3),
        ModelSize("S", 384, 12, 1536, 6),
        ModelSize("B", 768, 12, 3072, 12),
        ModelSize("L", 1024, 24, 4096, 16),
        ModelSize("H", 1280, 32, 5120, 16),
        ModelSize("G", 1664, 48, 8192, 16),
        ModelSize("e", 1792, 56, 15360, 16),
        ModelSize("j", 4096, 64, 32768, 32),
    )
}


def model_size(name: str) -> ModelSize:
    """The size called ``name``; case matters, because the ViT family has both a ``g`` and a ``G``.

    Raises:
        UserError: there is no such size; the message names the nearest ones.
    """
    if name in SIZES:
        return SIZES[name]
    near = [known for known in SIZES if known.lower() == str(name).lower()]
    near += [known for known in difflib.get_close_matches(str(name), SIZES, n=2, cutoff=0.5) if known not in near]
    hint = f"did you mean {' or '.join(repr(known) for known in near)}? " if near else ""
    raise UserError(f"model size {name!r} is not known: {hint}sizes are {', '.join(SIZES)} (case matters)")
