"""Linear layers of a few tokens, as decoding has them: every weight is read once, and what stands around a product
(norm, gates, RoPE, SwiGLU, residual, the cache) is done by the launch that computes it."""

from ssa.ops.few.api import HEAD_DIMS, Product, Projections, few_linear, few_project, is_few, serves

__all__ = ["HEAD_DIMS", "Product", "Projections", "few_linear", "few_project", "is_few", "serves"]
