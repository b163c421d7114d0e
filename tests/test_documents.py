"""Document boundaries: every view of a layout says the same thing, and malformed boundaries are named."""

from __future__ import annotations

import dataclasses
import pickle
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from oracles import document_slices, layouts, tokens
from ssa import DocumentLayout
from ssa.documents import IGNORE_INDEX, run_view
from ssa.errors import InputError

SIZES = st.sampled_from([1, 2, 4, 8])
LAYOUTS = SIZES.flatmap(lambda S: layouts(S, most=5))


def hand_made() -> DocumentLayout:
    """Two rows of 5 tokens: documents of 3 and 2, and one of 5."""
    return DocumentLayout.from_lengths([[3, 2], [5]])


# ---------------------------------------------------------------------- construction
def test_constructions_agree() -> None:
    by_lengths = DocumentLayout((3, 2, 5), batch=2, tokens=5)
    by_rows = DocumentLayout.from_lengths([[3, 2], [5]])
    by_offsets = DocumentLayout.from_cu_seqlens(torch.tensor([0, 3, 5, 10]), batch=2)
    by_int32 = DocumentLayout.from_cu_seqlens(torch.tensor([0, 3, 5, 10], dtype=torch.int32), batch=2, tokens=5)
    assert by_lengths == by_rows == by_offsets == by_int32
    assert len({by_lengths, by_rows, by_offsets, by_int32}) == 1, "equal layouts hash alike"


def test_one_row_of_lengths_and_single_agree() -> None:
    assert DocumentLayout.from_lengths([4, 1]) == DocumentLayout.from_lengths([[4, 1]])
    assert DocumentLayout.single(2, 6) == DocumentLayout.from_lengths([[6], [6]])
    assert DocumentLayout.single(2, 6).is_single
    assert not DocumentLayout.from_lengths([[3, 3], [6]]).is_single


def test_boundaries_matter_for_equality() -> None:
    assert DocumentLayout.from_lengths([3, 2]) != DocumentLayout.from_lengths([2, 3])
    assert DocumentLayout.from_lengths([[2], [2]]) != DocumentLayout.from_lengths([2, 2])


@given(LAYOUTS)
def test_cu_seqlens_round_trip(layout: DocumentLayout) -> None:
    cu = layout.cu_seqlens()
    assert cu.dtype == torch.int32
    assert DocumentLayout.from_cu_seqlens(cu, batch=layout.batch) == layout


def test_pickles_without_its_cache() -> None:
    layout = hand_made()
    layout.positions()
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_a_replaced_layout_does_not_inherit_cached_tensors() -> None:
    layout = DocumentLayout.from_lengths([2, 2])
    layout.positions()
    layout.block_grid(2)
    longer = dataclasses.replace(layout, lengths=(4,))
    assert longer.positions().tolist() == [[0, 1, 2, 3]]
    assert longer.block_grid(2).first_block.tolist() == [0, 0, 0, 0]


def test_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        hand_made().batch = 3  # type: ignore[misc]


# ---------------------------------------------------------------------- what it says
def test_by_hand() -> None:
    layout = hand_made()
    assert (layout.total, layout.max_length) == (10, 5)
    assert layout.cu_seqlens().tolist() == [0, 3, 5, 10]
    assert layout.starts().tolist() == [[0, 0, 0, 3, 3], [5, 5, 5, 5, 5]]
    assert layout.positions().tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert layout.document_ids().tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]]
    assert list(layout.runs()) == [(0, 1, 3), (3, 1, 2), (5, 1, 5)]


def test_block_grid_by_hand() -> None:
    grid = hand_made().block_grid(2)
    assert grid.num_blocks == 6
    assert grid.block_start.tolist() == [0, 2, 3, 5, 7, 9, 10]
    assert grid.first_block.tolist() == [0, 0, 0, 2, 2, 3, 3, 3, 3, 3]
    assert grid.row_blocks == (0, 3, 6)
    assert grid.block_start.dtype == grid.first_block.dtype == torch.int32


@given(LAYOUTS)
def test_positions_and_documents_by_counting(layout: DocumentLayout) -> None:
    document, position = tokens(layout)
    assert torch.equal(layout.document_ids(), document)
    assert torch.equal(layout.positions(), position)
    flat = torch.arange(layout.total).view(layout.batch, layout.tokens)
    assert torch.equal(layout.starts(), flat - position)


@given(LAYOUTS, SIZES)
def test_block_grid_restarts_at_every_document(layout: DocumentLayout, block_size: int) -> None:
    document, position = (x.flatten().tolist() for x in tokens(layout))
    grid = layout.block_grid(block_size)
    start, first_block = grid.block_start.tolist(), grid.first_block.tolist()
    assert start[0] == 0
    assert start[-1] == layout.total
    assert len(start) == grid.num_blocks + 1
    for row in range(layout.total):
        block = first_block[row] + position[row] // block_size
        assert start[block] == row - position[row] % block_size
        assert row < start[block + 1]
        assert document[start[block]] == document[row] == document[start[block + 1] - 1]
    assert [grid.row_blocks[b] for b in range(layout.batch)] == first_block[:: layout.tokens]
    assert grid.row_blocks[-1] == grid.num_blocks


@given(LAYOUTS)
def test_runs_cover_every_document_in_order(layout: DocumentLayout) -> None:
    assert [length for _, count, length in layout.runs() for _ in range(count)] == list(layout.lengths)
    marks = torch.zeros(layout.batch, layout.tokens, dtype=torch.long)
    seen = 0
    for run in layout.runs():
        view = run_view(marks, run)
        assert view.shape == (run[1], run[2])
        view += torch.arange(seen, seen + run[1])[:, None]
        seen += run[1]
    assert torch.equal(marks, layout.document_ids())


@given(LAYOUTS, st.integers(0, 1000))
def test_labels_never_cross_documents(layout: DocumentLayout, seed: int) -> None:
    ids = torch.randint(0, 100, (layout.batch, layout.tokens), generator=torch.Generator().manual_seed(seed))
    labels = layout.next_token_labels(ids)
    for row, document in document_slices(layout):
        assert labels[row, document].tolist() == [*ids[row, document][1:].tolist(), IGNORE_INDEX]


def test_labels_leave_their_input_alone() -> None:
    ids = torch.arange(10).view(2, 5)
    hand_made().next_token_labels(ids)
    assert torch.equal(ids, torch.arange(10).view(2, 5))


def test_tensors_are_made_once_per_device() -> None:
    layout = hand_made()
    assert layout.positions() is layout.positions()
    assert layout.block_grid(2) is layout.block_grid(2)
    assert layout.block_grid(4) is not layout.block_grid(2)
    assert layout.positions("meta").device.type == "meta"


# ---------------------------------------------------------------------- refusals (reliability.md section 3)
def offsets(*values: float, dtype: torch.dtype = torch.int64, **kwargs: int) -> DocumentLayout:
    return DocumentLayout.from_cu_seqlens(torch.tensor(values, dtype=dtype), **kwargs)


REFUSALS = {
    "8 no tokens": (lambda: DocumentLayout.single(2, 0), "tokens 0", "empty sequence"),
    "8 no rows": (lambda: DocumentLayout.single(0, 4), "batch 0", "at least 1"),
    "8 no documents": (lambda: DocumentLayout.from_lengths([]), "no lengths", "at least one document"),
    "8 empty row": (lambda: DocumentLayout.from_lengths([[]]), "tokens 0", "at least 1"),
    "12 first entry": (lambda: offsets(1, 4), "first entry 1", "0"),
    "13 decreasing": (lambda: offsets(0, 5, 3, 8), "decreasing entry 3 at index 2", "strictly increasing"),
    "14 duplicate": (lambda: offsets(0, 3, 3, 8), "duplicate entry (an empty document) 3 at index 2", "increasing"),
    "14 empty document": (lambda: DocumentLayout.from_lengths([3, 0]), "length 0 of document 1", "at least 1"),
    "14 negative": (lambda: DocumentLayout.from_lengths([-1, 3]), "length -1 of document 0", "at least 1"),
    "15 last entry": (lambda: offsets(0, 3, 8, tokens=9), "last entry 8", "9"),
    "15 not a multiple": (lambda: offsets(0, 3, 9, batch=2), "last entry 9", "multiple of batch 2"),
    "15 sum": (lambda: DocumentLayout((3, 2), 1, 6), "sum 5", "6"),
    "15 sum over": (lambda: DocumentLayout((3, 3, 3), 1, 6), "sum 9", "6"),
    "15 unequal rows": (lambda: DocumentLayout.from_lengths([[3], [4]]), "[3, 4]", "equal length"),
    "16 crosses rows": (lambda: offsets(0, 3, 6, 8, batch=2), "document 1 crossing", "packing the batch"),
    "16 longer than a row": (lambda: DocumentLayout((8,), 2, 4), "document 0 crossing", "inside one row"),
    "16 batch of none": (lambda: offsets(0, 4, batch=0), "batch 0", "at least 1"),
    "16 2-D": (lambda: DocumentLayout.from_cu_seqlens(torch.zeros(2, 3, dtype=torch.int32)), "shape (2, 3)", "1-D"),
    "17 float": (lambda: offsets(0, 4, dtype=torch.float32), "dtype torch.float32", "int32 or int64"),
    "17 bool": (lambda: offsets(0, 1, dtype=torch.bool), "dtype torch.bool", "int32 or int64"),
    "17 float lengths": (lambda: DocumentLayout.from_lengths([1.5, 2.5]), "[1.5, 2.5]", "integers"),
    "17 tensor of lengths": (lambda: DocumentLayout.from_lengths(torch.tensor([2, 3])), "tensor", "integers"),
    "one offset": (lambda: offsets(0), "shape (1,)", "at least two entries"),
    "labels of another shape": (lambda: hand_made().next_token_labels(torch.zeros(2, 6)), "(2, 6)", "(2, 5)"),
    "tensor of another shape": (lambda: hand_made().check(torch.zeros(1, 10), "here"), "here: got", "(2, 5)"),
    "block size 0": (lambda: hand_made().block_grid(0), "block_size: got 0", "at least 1"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_what_is_wrong(name: str) -> None:
    call, *fragments = REFUSALS[name]
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert re.match(r".+: got .+; expected .+", message, re.DOTALL)
    for fragment in fragments:
        assert fragment in message
