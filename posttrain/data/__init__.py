"""Formats, chat templates and packing: from rows of a file to packed batches."""

from posttrain.data.batch import PackedBatch
from posttrain.data.example import Example

__all__ = ["Example", "PackedBatch"]
