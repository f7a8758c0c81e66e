"""File to file: texts are read as a stream and vectors written as they come, so neither is ever held whole."""

from __future__ import annotations

from unpadded.bulk.job import Job, Totals, make_job, peak_memory, run_job
from unpadded.bulk.readers import Broken, Row, read_rows
from unpadded.quantization import read_ranges

__all__ = ["Broken", "Job", "Row", "Totals", "make_job", "peak_memory", "read_ranges", "read_rows", "run_job"]
