"""Training: recipe, stream schedule, loop, checkpoints and telemetry.

:func:`ssa.train.loop.train` runs a :class:`ssa.train.recipe.Recipe`, which :func:`ssa.train.recipe_file.load_recipe`
reads from YAML. Nothing is imported here, so that reading a recipe stays cheap.
"""
