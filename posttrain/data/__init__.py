"""Formats, chat templates and packing: from rows of a file to packed batches."""

from posttrain.data.batch import PackedBatch
from posttrain.data.example import Example, Pair
from posttrain.data.load import load_rows
from posttrain.data.pack import pack_best_fit
from posttrain.data.preference import tokenize_preference
from posttrain.data.rows import DataError, Rows
from posttrain.data.tokenize import tokenize_sft

__all__ = [
    "DataError",
    "Example",
    "PackedBatch",
    "Pair",
    "Rows",
    "load_rows",
    "pack_best_fit",
    "tokenize_preference",
    "tokenize_sft",
]
