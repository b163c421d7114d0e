"""Validation: a mean over targets in every mode that the method has, and nothing left changed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_runs import VOCABULARY, tiny

from ssa.data import Loader, PackedDataset
from ssa.train.build import build_model, read_validation_rows
from ssa.train.validation import validate

CPU = torch.device("cpu")


@pytest.mark.parametrize(("method", "modes"), [("ssa", ["full", "sparse"]), ("nsa", ["sparse"])])
def test_the_mean_is_over_targets_however_the_rows_are_split(method: str, modes: list[str], data: Path) -> None:
    model = build_model(tiny(data, method).model_config(VOCABULARY), 0).train()
    dataset = PackedDataset(data, "valid")
    whole, split = (list(Loader(dataset, rows, shuffle=False, epochs=1)) for rows in (6, 4))
    assert split[0].targets / 4 != split[1].targets / 2, "the split must be uneven to prove anything"
    one, other = (validate(model, batches, CPU, nullcontext) for batches in (whole, split))
    assert list(one) == modes
    assert one == pytest.approx(other, rel=1e-6)
    assert model.training
    assert model.config.inference_mode == "sparse"
    assert all(p.grad is None for p in model.parameters())


def test_the_modes_are_run_as_named(data: Path) -> None:
    model = build_model(tiny(data).model_config(VOCABULARY), 0)
    batch = next(Loader(PackedDataset(data, "valid"), 2, shuffle=False))
    found = validate(model, [batch], CPU, nullcontext)
    for mode in ("full", "sparse"):
        with torch.no_grad(), model.attention_mode(mode):
            output = model(batch.input_ids, labels=batch.labels, layout=batch.layout)
        assert found[mode] == pytest.approx(float(output.cross_entropy), rel=1e-6)
    assert found["full"] != found["sparse"]


def test_rows_are_the_first_of_the_split_and_none_without_validation(data: Path) -> None:
    assert [batch.rows for batch in read_validation_rows(tiny(data, training__validate_rows=3))] == [2, 1]
    assert [batch.rows for batch in read_validation_rows(tiny(data, training__validate_rows=99))] == [2, 2, 2]
    assert read_validation_rows(tiny(data, training__validate_every=0)) == []
