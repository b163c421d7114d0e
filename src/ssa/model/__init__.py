"""The language model on transformers, and our attention in stock models.

Importing this registers the model with ``AutoConfig`` and ``AutoModelForCausalLM``, and ``attn_implementation="ssa"``.
"""

from ssa.model.configuration import METHODS, SSAConfig
from ssa.model.interface import attention_mode, configure, last_alignment, register, restore, set_stream
from ssa.model.loading import load_model
from ssa.model.modeling import SSAForCausalLM, SSAModel, SSAOutput

__all__ = [
    "METHODS",
    "SSAConfig",
    "SSAForCausalLM",
    "SSAModel",
    "SSAOutput",
    "attention_mode",
    "configure",
    "last_alignment",
    "load_model",
    "register",
    "restore",
    "set_stream",
]
