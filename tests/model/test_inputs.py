import pytest
import torch

from ssa import DocumentLayout
from ssa.errors import InputError
from ssa.model.inputs import resolve_documents


def lengths(**given):
    return resolve_documents(2, 6, **given).lengths


def test_nothing_given_is_one_document_per_row():
    assert lengths() == (6, 6)


def test_a_layout_wins_and_is_taken_as_it_is():
    layout = DocumentLayout.from_lengths([[2, 4], [6]])
    assert resolve_documents(2, 6, layout=layout, cu_seqlens=torch.tensor([0, 6, 12])) is layout


def test_padding_at_either_end_becomes_documents_of_its_own():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    assert lengths(attention_mask=mask) == (2, 4, 1, 4, 1)


def test_position_ids_mark_packed_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]])
    assert lengths(position_ids=positions) == (3, 3, 1, 5)
    assert lengths(position_ids=torch.arange(6)[None]) == (6, 6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layout": DocumentLayout.single(1, 6)}, "layout: got"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]] * 2)}, "attention_mask: got a hole in row 0"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask: got shape"),
        ({"position_ids": torch.arange(6)[None] + 3}, "position_ids: got a document starting at position 3"),
        ({"cu_seqlens": torch.tensor([0, 12])}, "crossing the end of a row"),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        resolve_documents(2, 6, **given)
