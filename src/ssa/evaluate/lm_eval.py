"""``python -m ssa.evaluate.lm_eval ARGUMENTS``: lm-eval's own command with our model registered.

For releases that do not read entry points (up to 0.4.13): ``python -m ssa.evaluate.lm_eval run --model ssa ...``.
"""

from lm_eval.__main__ import cli_evaluate

from ssa.evaluate.harness import SSALM

__all__ = ["SSALM", "main"]


def main() -> None:
    """Run lm-eval's command line."""
    cli_evaluate()


if __name__ == "__main__":
    main()
