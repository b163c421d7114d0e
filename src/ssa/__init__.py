"""SSA: Sparse Sparse Attention (arXiv 2511.20102).

Train one language model under full and block-sparse attention, run it in either mode at any budget.
``ssa.ops`` holds the attention operations (torch only), ``ssa.model`` the language model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ssa._version import __version__
from ssa.errors import SSAError

if TYPE_CHECKING:
    from ssa.documents import DocumentLayout
    from ssa.generation import generate
    from ssa.model import SSAConfig, SSAForCausalLM, load_model

__all__ = ["DocumentLayout", "SSAConfig", "SSAError", "SSAForCausalLM", "__version__", "generate", "load_model"]

_HOMES = {  # imported on first use, so that `ssa --help` needs no torch and `ssa.ops` no transformers
    "DocumentLayout": "ssa.documents",
    "SSAConfig": "ssa.model",
    "SSAForCausalLM": "ssa.model",
    "generate": "ssa.generation",
    "load_model": "ssa.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ssa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
