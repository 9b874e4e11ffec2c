"""Where bytes lie on disk, and how they come into memory. Knows nothing of models, plans or arenas."""

from mball.storage.calibration import Effort, calibrate
from mball.storage.calibration_cache import find_calibrated_link, load_calibration, save_calibration
from mball.storage.checked import CheckedReader
from mball.storage.checkpoint import CheckpointIndex, TensorEntry
from mball.storage.files import DIRECT_ALIGNMENT_BYTES, DirectIO, FileTable
from mball.storage.mounts import FileSystem, file_system_of
from mball.storage.probe import DirectoryFacts, measure_link, probe_directory
from mball.storage.reader import Read, Reader, ReadHandle, ReadStatistics
from mball.storage.swapfile import SwapFile, SwapSettings, SwapStatistics
from mball.storage.threads import ThreadedReader
from mball.storage.write_queue import PendingWrites, QueueLimits, Write

__all__ = [
    "DIRECT_ALIGNMENT_BYTES",
    "CheckedReader",
    "CheckpointIndex",
    "DirectIO",
    "DirectoryFacts",
    "Effort",
    "FileSystem",
    "FileTable",
    "PendingWrites",
    "QueueLimits",
    "Read",
    "ReadHandle",
    "ReadStatistics",
    "Reader",
    "SwapFile",
    "SwapSettings",
    "SwapStatistics",
    "TensorEntry",
    "ThreadedReader",
    "Write",
    "calibrate",
    "file_system_of",
    "find_calibrated_link",
    "load_calibration",
    "measure_link",
    "probe_directory",
    "save_calibration",
]
