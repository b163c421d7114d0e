"""The paper's experiments from one command: variants and seeds as pieces that are trained, evaluated and kept."""

from ssa.reproduce.plan import SCALES, Piece, Scale, pieces
from ssa.reproduce.study import Progress, Study, run_study

__all__ = ["SCALES", "Piece", "Progress", "Scale", "Study", "pieces", "run_study"]
