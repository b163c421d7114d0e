"""SSA: Sparse Sparse Attention (arXiv 2511.20102).

Train one language model under full and block-sparse attention, run it in either mode at any budget.
``ssa.ops`` holds the attention operations (torch only), ``ssa.model`` the language model.
"""

from ssa._version import __version__
from ssa.documents import DocumentLayout
from ssa.errors import SSAError

__all__ = ["DocumentLayout", "SSAError", "__version__"]
