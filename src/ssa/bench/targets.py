"""The record against its targets: ``benchmarks/results/targets.json``, written by the benchmark command only."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssa.bench.runner import Record, milliseconds
from ssa.errors import DataError

SCHEMA = "ssa.targets/1"


@dataclass(frozen=True)
class Target:
    """A row of the record.

    Attributes:
        id: name.
        target: what was promised.
        unit: of both figures.
        higher_is_better: which side of ``target`` meets it.
        figure: computes the figure from the records of a run, None if the run does not say.
    """

    id: str
    target: float
    unit: str
    higher_is_better: bool
    figure: Callable[[Sequence[Record]], float | None]

    def met(self, measured: float) -> bool:
        """Whether a figure meets the target."""
        return measured >= self.target if self.higher_is_better else measured <= self.target


def find(
    records: Sequence[Record], workload: str, family: str, direction: str, inputs: str = "correlated", backend: str = ""
) -> list[Record]:
    """Records with a time, of a workload and kind; ``backend``: how its name begins."""
    return [
        r for r in records
        if r["workload"]["name"] == workload and r["workload"]["inputs"] == inputs and r["family"] == family
        and r["direction"] == direction and r["backend"].startswith(backend) and milliseconds(r) is not None
    ]  # fmt: skip


def _fastest(records: Sequence[Record], wall: bool = False) -> float | None:
    return min((t for r in records if (t := milliseconds(r, wall)) is not None), default=None)


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def speed_up(workload: str, direction: str, inputs: str = "correlated") -> Callable[[Sequence[Record]], float | None]:
    """Fastest full attention of the run over our sparse attention with selection."""

    def figure(records: Sequence[Record]) -> float | None:
        full = _fastest(find(records, workload, "full", direction))  # its time does not depend on the inputs
        return _over(full, _fastest(find(records, workload, "sparse", direction, inputs, "ssa")))

    return figure


def over_official(workload: str) -> Callable[[Sequence[Record]], float | None]:
    """The official operation's time (``--peer peer_official:attention``) over ours, forward and backward."""

    def figure(records: Sequence[Record]) -> float | None:
        direction = "forward+backward"
        theirs = _fastest(find(records, workload, "sparse", direction, backend="peer peer_official"))
        return _over(theirs, _fastest(find(records, workload, "sparse", direction, backend="ssa")))

    return figure


def packed_overhead(workload: str, baseline: str) -> Callable[[Sequence[Record]], float | None]:
    """Our full stream over batched cuDNN: the worse of forward and forward+backward, the longer of device and wall."""

    def figure(records: Sequence[Record]) -> float | None:
        ratios = []
        for direction in ("forward", "forward+backward"):
            mine = _fastest(find(records, workload, "full", direction, backend="ssa cuda"), wall=True)
            ratios.append(
                _over(mine, _fastest(find(records, workload, "full", direction, backend=baseline), wall=True))
            )
        known = [r for r in ratios if r is not None]
        return max(known) if len(known) == len(ratios) else None

    return figure


def memory(workload: str) -> Callable[[Sequence[Record]], float | None]:
    """Peak memory of our sparse forward and backward over Flash attention's."""

    def figure(records: Sequence[Record]) -> float | None:
        peaks = []
        for family, backend in (("sparse", "ssa"), ("full", "sdpa flash")):
            found = find(records, workload, family, "forward+backward", backend=backend)
            peaks.append(found[0].get("peak_bytes") if found else None)
        return _over(peaks[0], peaks[1])

    return figure


def whole_model(name: str, ratio: bool = True) -> Callable[[Sequence[Record]], float | None]:
    """The fastest full attention's time over sparse mode's in the suite ``generate``, or sparse mode's time itself."""

    def figure(records: Sequence[Record]) -> float | None:
        found = find(records, name, "model", name.split()[1], "random")
        sparse = _fastest([r for r in found if r["backend"] == "sparse"], wall=True)
        full = _fastest([r for r in found if r["backend"] != "sparse"], wall=True)
        return _over(full, sparse) if ratio else sparse

    return figure


def _targets() -> list[Target]:
    names = {"8k": "1B 4x8K", "32k": "1B 32K", "128k": "1B 128K"}
    promised = {
        "sparse_fwd": ("forward", {"8k": (3.2, 2.4), "32k": (7, 5.5), "128k": (12, 8)}),
        "sparse_fwdbwd": ("forward+backward", {"8k": (4.8, 3.6), "32k": (13, 10.5), "128k": (27, 21)}),
    }
    found = []
    for prefix, (direction, values) in promised.items():
        for size, (correlated, random) in values.items():
            name = f"{prefix}_{size}"
            found.append(Target(name, correlated, "x", True, speed_up(names[size], direction)))
            found.append(Target(f"{name}_random", random, "x", True, speed_up(names[size], direction, "random")))
    found.append(Target("full_packed_32x1k", 1.15, "x", False, packed_overhead("1B packed 32x1K", "sdpa cudnn")))
    found.append(Target("full_packed_mix", 1.15, "x", False, packed_overhead("1B packed mix", "sum over")))
    for size, value in {"8k": 5, "32k": 9, "128k": 16}.items():
        found.append(Target(f"vs_official_fwdbwd_{size}", value, "x", True, over_official(names[size])))
    for size, (forward, both) in {"8k": (1.8, 2.6), "32k": (4, 7)}.items():
        name = f"8B {size.upper()}"
        found.append(Target(f"8b_fwd_{size}", forward, "x", True, speed_up(name, "forward")))
        found.append(Target(f"8b_fwdbwd_{size}", both, "x", True, speed_up(name, "forward+backward")))
    found.append(Target("generate_1b_64k_b16", 3, "x", True, whole_model("1B decode 64K b16")))
    found.append(Target("prefill_1b_128k_ms", 950, "ms", False, whole_model("1B prefill 128K b1", ratio=False)))
    found.append(Target("prefill_1b_128k_ratio", 3.3, "x", True, whole_model("1B prefill 128K b1")))
    found.append(Target("decode_cpu_32k", 3, "x", True, whole_model("64M decode 32K b1")))
    found.append(Target("decode_cpu_32k_attention", 3, "x", True, whole_model("64M attention 32K b1")))
    return [*found, Target("memory_128k", 1.3, "x", False, memory("1B 128K"))]


TARGETS: tuple[Target, ...] = tuple(_targets())


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a record file; none if there is no file."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            raise DataError(str(path), f"schema {found['schema']!r}", SCHEMA)
        return list(found["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(str(path), f"{type(error).__name__}: {error}", f"a record of schema {SCHEMA}") from error


def update(path: Path, result: dict[str, Any], targets: Sequence[Target] = TARGETS) -> list[dict[str, Any]]:
    """Write the figures of a run into the record: a target that the run does not measure keeps its row.

    A missed target stays with its true figure, and a later, worse run replaces a better one.
    """
    old = {row["id"]: row for row in read(path)}
    rows = []
    for target in targets:
        measured = target.figure(result["cases"])
        row = old.pop(target.id, None)
        promise = {
            "target": target.target,
            "unit": target.unit,
            "better": "higher" if target.higher_is_better else "lower",
        }
        if measured is not None:
            run = {key: result[key] for key in ("command", "commit", "created")}
            rows.append({
                "id": target.id, **promise, "measured": round(measured, 3), "met": target.met(measured),
                "command": run["command"], "commit": run["commit"], "machine": result["machine"]["label"],
                "date": run["created"][:10],
            })  # fmt: skip
        elif row is not None:
            rows.append({**row, **promise, "met": row["measured"] is not None and target.met(row["measured"])})
        else:
            nothing = dict.fromkeys(("measured", "met", "command", "commit", "machine", "date"))
            rows.append({"id": target.id, **promise, **nothing})
    rows += old.values()  # rows of other benchmarks in the same file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, "rows": rows}, indent=1) + "\n")
    return rows


def one_line(row: dict[str, Any]) -> str:
    """A row of the record for the terminal."""
    verdict = {True: "met", False: "MISSED", None: "not measured"}[row["met"]]
    return f"{row['id']:<26} target {row['target']:g}{row['unit']}, measured {row['measured']}: {verdict}"
