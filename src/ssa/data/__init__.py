"""From text to packed rows, and from packed rows to resumable batches."""

from ssa.data.corpus import Document, iter_documents
from ssa.data.files import Limits
from ssa.data.loader import Batch, Loader, PackedDataset
from ssa.data.packing import Packer, Row
from ssa.data.prepare import prepare
from ssa.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer

__all__ = [
    "Batch",
    "Document",
    "Limits",
    "Loader",
    "PackedDataset",
    "Packer",
    "Row",
    "iter_documents",
    "load_tokenizer",
    "prepare",
    "tokenizer_fingerprint",
    "train_tokenizer",
]
