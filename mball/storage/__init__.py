"""Where bytes lie on disk, and how they come into memory. Knows nothing of models, plans or arenas."""

from mball.storage.calibration import Effort, calibrate
from mball.storage.calibration_cache import find_calibrated_link, load_calibration, save_calibration
from mball.storage.checkpoint import CheckpointIndex
from mball.storage.files import DIRECT_ALIGNMENT_BYTES, DirectIO, FileTable
from mball.storage.header import FileIdentity, TensorEntry
from mball.storage.mounts import FileSystem, file_system_of
from mball.storage.probe import DirectoryFacts, measure_link, probe_directory
from mball.storage.reader import Read, Reader, ReadHandle, ReadStatistics
from mball.storage.swapfile import SwapFile
from mball.storage.threads import ThreadedReader

__all__ = [
    "DIRECT_ALIGNMENT_BYTES",
    "CheckpointIndex",
    "DirectIO",
    "DirectoryFacts",
    "Effort",
    "FileIdentity",
    "FileSystem",
    "FileTable",
    "Read",
    "ReadHandle",
    "ReadStatistics",
    "Reader",
    "SwapFile",
    "TensorEntry",
    "ThreadedReader",
    "calibrate",
    "file_system_of",
    "find_calibrated_link",
    "load_calibration",
    "measure_link",
    "probe_directory",
    "save_calibration",
]
