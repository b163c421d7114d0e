"""SSA: Sparse Sparse Attention (arXiv 2511.20102).

Train one language model under full and block-sparse attention, run it in either mode at any budget.
``ssa.ops`` holds the attention operations (torch only), ``ssa.model`` the language model.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ssa._version import __version__
from ssa.errors import SSAError

if TYPE_CHECKING:
    from ssa.documents import DocumentLayout
    from ssa.generation import generate
    from ssa.model import (
        SSAConfig,
        SSAForCausalLM,
        attention_mode,
        configure,
        last_alignment,
        load_model,
        register,
        restore,
        set_stream,
    )

__all__ = [
    "DocumentLayout",
    "SSAConfig",
    "SSAError",
    "SSAForCausalLM",
    "__version__",
    "attention_mode",
    "configure",
    "generate",
    "last_alignment",
    "load_model",
    "register",
    "restore",
    "set_stream",
]

_HOMES = {  # imported on first use, so that `ssa --help` needs no torch and `ssa.ops` no transformers
    "DocumentLayout": "ssa.documents",
    "SSAConfig": "ssa.model",
    "SSAForCausalLM": "ssa.model",
    "attention_mode": "ssa.model",
    "configure": "ssa.model",
    "generate": "ssa.generation",
    "last_alignment": "ssa.model",
    "load_model": "ssa.model",
    "register": "ssa.model",
    "restore": "ssa.model",
    "set_stream": "ssa.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ssa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


# Whoever has transformers loaded already gets attn_implementation="ssa" with `import ssa` alone. Loading transformers
# here would cost seconds in every `import ssa.ops` and `ssa --help`: in the other order, ssa.register() does it.
if "transformers" in sys.modules:
    import_module("ssa.model")
