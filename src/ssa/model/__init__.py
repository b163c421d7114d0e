"""The language model on transformers. Importing this registers it with ``AutoConfig`` and ``AutoModelForCausalLM``."""

from ssa.model.configuration import METHODS, SSAConfig
from ssa.model.loading import load_model
from ssa.model.modeling import SSAForCausalLM, SSAModel, SSAOutput

__all__ = ["METHODS", "SSAConfig", "SSAForCausalLM", "SSAModel", "SSAOutput", "load_model"]
