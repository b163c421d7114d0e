"""``python -m ssa.evaluate.tasks SOURCE FOLDER``: task definitions for plain ``lm_eval --include_path FOLDER``."""

import sys
from pathlib import Path

from ssa.errors import SSAError
from ssa.evaluate.tasks import write_tasks


def main(argv: list[str]) -> int:
    """Write the tasks, print their names; exit code 0, or 2 for bad input."""
    if len(argv) != 2:
        print("usage: python -m ssa.evaluate.tasks SOURCE FOLDER", file=sys.stderr)
        return 2
    try:
        print("\n".join(write_tasks(Path(argv[0]), Path(argv[1])).values()))
    except SSAError as error:
        print(f"ssa.evaluate.tasks: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
