"""Bulk jobs from files to files: texts and vectors are streamed, so memory does not grow with the input."""

from __future__ import annotations

from unpadded.bulk.job import Job, Totals, make_job, peak_memory, run_job
from unpadded.bulk.readers import RejectedRow, Row, read_rows
from unpadded.quantization import read_ranges

__all__ = ["Job", "RejectedRow", "Row", "Totals", "make_job", "peak_memory", "read_ranges", "read_rows", "run_job"]
