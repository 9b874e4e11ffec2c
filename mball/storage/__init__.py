"""Where bytes lie on disk, and how they come into memory. Knows nothing of models, plans or arenas."""

from mball.storage.checkpoint import CheckpointIndex, TensorEntry
from mball.storage.files import DIRECT_ALIGNMENT_BYTES, DirectIO, FileTable
from mball.storage.probe import DirectoryFacts, measure_link, probe_directory
from mball.storage.reader import Read, Reader, ReadHandle, ReadStatistics
from mball.storage.swapfile import SwapFile
from mball.storage.threads import ThreadedReader

__all__ = [
    "DIRECT_ALIGNMENT_BYTES",
    "CheckpointIndex",
    "DirectIO",
    "DirectoryFacts",
    "FileTable",
    "Read",
    "ReadHandle",
    "ReadStatistics",
    "Reader",
    "SwapFile",
    "TensorEntry",
    "ThreadedReader",
    "measure_link",
    "probe_directory",
]
