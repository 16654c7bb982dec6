"""Formats, chat templates and packing: from rows of a file to packed batches."""

from posttrain.data.batch import PackedBatch
from posttrain.data.example import Example
from posttrain.data.pack import pack_best_fit

__all__ = ["Example", "PackedBatch", "pack_best_fit"]
