"""Where bytes lie on disk, and how they come into memory. Knows nothing of models, plans or arenas."""

from mball.storage.alignment import DIRECT_ALIGNMENT_BYTES
from mball.storage.calibration import Effort, calibrate
from mball.storage.calibration_cache import (
    calibrated_choice,
    find_calibrated_link,
    fitted_choice,
    load_calibration,
    save_calibration,
)
from mball.storage.checked import CheckedReader
from mball.storage.checkpoint import CheckpointIndex
from mball.storage.choice import FileReader, ReaderChoice, Threads, choose_reader
from mball.storage.files import DirectIO, FileTable
from mball.storage.header import FileIdentity, TensorEntry
from mball.storage.mounts import FileSystem, file_system_of
from mball.storage.native import NativeReader, ReadPoolLibrary, load_read_pool
from mball.storage.probe import LINK_TIME_LIMIT_S, DirectoryFacts, measure_link, probe_directory
from mball.storage.reader import Read, Reader, ReadHandle, ReadStatistics
from mball.storage.swapfile import SwapFile, SwapSettings, SwapStatistics
from mball.storage.threads import ThreadedReader
from mball.storage.write_queue import QueueLimits
from mball.storage.writes import Write

__all__ = [
    "DIRECT_ALIGNMENT_BYTES",
    "LINK_TIME_LIMIT_S",
    "CheckedReader",
    "CheckpointIndex",
    "DirectIO",
    "DirectoryFacts",
    "Effort",
    "FileIdentity",
    "FileReader",
    "FileSystem",
    "FileTable",
    "NativeReader",
    "QueueLimits",
    "Read",
    "ReadHandle",
    "ReadPoolLibrary",
    "ReadStatistics",
    "Reader",
    "ReaderChoice",
    "SwapFile",
    "SwapSettings",
    "SwapStatistics",
    "TensorEntry",
    "ThreadedReader",
    "Threads",
    "Write",
    "calibrate",
    "calibrated_choice",
    "choose_reader",
    "file_system_of",
    "find_calibrated_link",
    "fitted_choice",
    "load_calibration",
    "load_read_pool",
    "measure_link",
    "probe_directory",
    "save_calibration",
]
