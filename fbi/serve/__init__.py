"""Serving: the layers of a trained model in forms that are made to be fast, not to be trained."""

from typing import TYPE_CHECKING

from fbi.lazy import lazy_names

if TYPE_CHECKING:
    from fbi.serve.decode import decode_step as decode_step
    from fbi.serve.decode import sparse as sparse
    from fbi.serve.decode import unstacked as unstacked
    from fbi.serve.ffn import packed_ffn as packed_ffn
    from fbi.serve.ffn import sparse_ffn as sparse_ffn
    from fbi.serve.packed import Packed as Packed
    from fbi.serve.packed import pack as pack

__getattr__ = lazy_names(
    "fbi.serve",
    {
        "Packed": "fbi.serve.packed",
        "decode_step": "fbi.serve.decode",
        "pack": "fbi.serve.packed",
        "packed_ffn": "fbi.serve.ffn",
        "sparse": "fbi.serve.decode",
        "sparse_ffn": "fbi.serve.ffn",
        "unstacked": "fbi.serve.decode",
    },
)
