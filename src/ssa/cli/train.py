"""``ssa train RECIPE``: train a recipe, or resume it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ssa.errors import ConfigError, SSAError
from ssa.train.recipe import Recipe

HELP = "train a recipe, or resume it"

_DESCRIPTION = """Train a recipe, or resume it. RECIPE comes first: a YAML file, or a shipped name such as
quickstart/ssa. The options are the recipe's keys; their defaults are the recipe's values."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the command line says.

    Attributes:
        recipe: YAML file or shipped name.
        checkpoint: train these weights on: model or run folder, or a Llama, Mistral, Qwen2, Qwen3 or published SSA
            checkpoint. Gives the shape of the model; everything else is the recipe's.
        resume: go on with the run in --out from its newest checkpoint, or from the checkpoint at this path.
        dry_run: print the resolved recipe, its size and an estimate of its memory, and stop.
    """

    recipe: Annotated[str, tyro.conf.Positional]
    checkpoint: Annotated[str | None, tyro.conf.arg(name="from", metavar="CHECKPOINT")] = None
    resume: Annotated[str, tyro.conf.arg(metavar="[PATH]")] = ""
    dry_run: bool = False
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field()


def run(argv: list[str]) -> int:
    """Parse ``argv``, train, and return the exit code: 0, or 143 and 130 after SIGTERM and SIGINT."""
    command = parse(argv)
    if command.dry_run:
        from ssa.train.summary import summarise

        print(summarise(command.settings))
        return 0
    from ssa.train.loop import train
    from ssa.train.world import read_world

    world = read_world()
    try:
        outcome = train(command.settings, resume=command.resume or None)
    except SSAError as error:
        if world.size == 1:
            raise
        print(f"ssa train: rank {world.rank}: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # the threads of a broken process group may keep an ordinary exit waiting
    if world.rank > 0:
        return outcome.exit_code
    if outcome.reason == "finished":
        print(f"{outcome.folder / 'model'}: trained for {outcome.step} steps. Next: ssa eval {outcome.folder}")
    else:
        print(f"{outcome.folder}: saved after step {outcome.step} on {outcome.reason}. Go on with --resume")
    return outcome.exit_code


def parse(argv: list[str]) -> Command:
    """The command with the recipe's values as defaults of the flags.

    Raises:
        ConfigError: no recipe, or values that the recipe's checks refuse.
        SystemExit: from tyro; 2 for an unknown flag or an ill-typed value, 0 after ``--help``.
    """
    from ssa.train.continued import shape_of
    from ssa.train.recipe_file import load_recipe, shipped_recipes

    wants_help = "-h" in argv or "--help" in argv
    named = bool(argv) and not argv[0].startswith("-")
    if not named and not wants_help:
        expected = f"a YAML file or one of {', '.join(shipped_recipes())}"
        raise ConfigError("first argument", argv[0] if argv else "no recipe", expected)
    name = argv[0] if named else "quickstart/ssa"
    checkpoint = _value_of("--from", argv)
    shape = {} if checkpoint is None else shape_of(checkpoint)
    default = Command(recipe=name, settings=load_recipe(name, shape))
    return tyro.cli(Command, args=_spell_out_resume(argv), default=default, prog="ssa train", description=_DESCRIPTION)


def _value_of(flag: str, argv: list[str]) -> str | None:
    """What follows a flag; its value is needed before the other flags have their defaults."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument == flag and following and not following.startswith("--"):
            return following
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def _spell_out_resume(argv: list[str]) -> list[str]:
    """``--resume`` without a path means the latest checkpoint; tyro has no flags with an optional value."""
    spelt = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        spelt.append(argument)
        if argument == "--resume" and following.startswith("--"):
            spelt.append("latest")
    return spelt
