import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssa.data import Packer
from ssa.errors import ConfigError


def pack(documents, row_length, padding=0):
    packer = Packer(row_length, padding)
    rows = [row for document in documents for row in packer.add(document)]
    return rows + list(packer.flush())


def test_by_hand():
    rows = pack([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]], 4, padding=99)
    assert [row.input_ids.tolist() for row in rows] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 99, 99]]
    assert [row.lengths for row in rows] == [(3, 1), (1, 3), (2,)]


def test_a_stream_that_ends_with_a_full_row_has_no_padding():
    assert [row.lengths for row in pack([[1, 2, 3, 4]], 2)] == [(2,), (2,)]
    assert pack([], 4) == []


@given(st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=40), max_size=20), st.integers(2, 17))
def test_nothing_is_lost_and_every_boundary_is_kept(documents, row_length):
    rows = pack(documents, row_length)
    text = [row.input_ids[: sum(row.lengths)] for row in rows]
    joined = np.concatenate(text).tolist() if text else []
    assert joined == [token for document in documents for token in document]
    assert all(len(row.input_ids) == row_length and min(row.lengths) >= 1 for row in rows)
    assert all(sum(row.lengths) == row_length for row in rows[:-1])
    ends = np.cumsum([n for row in rows for n in row.lengths]).tolist()
    own = np.cumsum([len(d) for d in documents]).tolist()
    cuts = [row_length * i for i in range(1, len(rows))]
    assert ends == sorted({*own, *cuts})  # each document's end and each row's, nothing else, nothing twice


def test_a_row_of_one_token_has_no_target_and_is_refused():
    with pytest.raises(ConfigError, match="row_length: got 1"):
        Packer(1)
