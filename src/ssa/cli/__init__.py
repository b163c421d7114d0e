"""The ``ssa`` command. Each subcommand is a module that is imported only when it runs, so ``--help`` is instant."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pkgutil import iter_modules

from ssa._version import __version__
from ssa.errors import SSAError

ORDER = (
    "quickstart",
    "prepare",
    "train",
    "eval",
    "generate",
    "serve",
    "convert",
    "report",
    "reproduce",
    "bench",
    "doctor",
)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (0 good, 2 bad input, others as in :mod:`ssa.errors`)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"ssa {__version__}")
        return 0
    if argv[0] not in commands():
        print(f"ssa: got command {argv[0]!r}; expected one of {', '.join(commands())}; try ssa --help", file=sys.stderr)
        return 2
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    try:
        return int(import_module(f"ssa.cli.{argv[0]}").run(argv[1:]) or 0)
    except SSAError as error:
        print(f"ssa {argv[0]}: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:  # tyro, on a wrong flag (2) or --help (0)
        return stop.code if isinstance(stop.code, int) else 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "ssa":
            raise
        print(
            f"ssa {argv[0]}: got no package {error.name!r}; expected it to be installed; "
            f"try pip install 'sparse-sparse-attention[eval]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # `ssa ... | head`
        sys.stderr.close()
        return 0


def commands() -> list[str]:
    """Names of the subcommands that this installation has, in the order a user meets them."""
    found = {module.name for module in iter_modules(__path__)}
    return [name for name in ORDER if name in found]


def _overview() -> str:
    lines = ["ssa: Sparse Sparse Attention. Train under full and block-sparse attention, run in either mode.", ""]
    lines += ["usage: ssa COMMAND [OPTIONS]    (ssa COMMAND --help shows the options)", ""]
    lines += [f"  {name:<11} {SUMMARIES[name]}" for name in commands()]
    return "\n".join(lines)


# Here and not in the modules, so that the overview needs no import.
SUMMARIES = {
    "quickstart": "the main job in minutes: prepare text, train FullAttn, MoBA and SSA, evaluate, report",
    "prepare": "text files, jsonl, parquet or hub data to tokenised, packed rows",
    "train": "train a recipe, or resume it",
    "eval": "perplexity and attention statistics in both modes and at several budgets",
    "generate": "continue a prompt with a checkpoint",
    "serve": "a model over HTTP with OpenAI's interface, in one mode at one budget",
    "convert": "a Llama, Qwen or published SSA checkpoint to our form and back, the same function",
    "report": "one HTML page and figures from result files",
    "reproduce": "the paper's experiments with seeds and ablations, and a verdict for each of its claims",
    "bench": "speed of the attention operations against the best full attention, correctness first",
    "doctor": "what this machine has, and which backend serves which operation",
}
