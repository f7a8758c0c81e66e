"""Bulk jobs from files to files: texts and vectors are streamed, so memory does not grow with the input."""

from __future__ import annotations

from unpadded.bulk.job import Job, Totals, make_job, run_job
from unpadded.bulk.readers import read_ranges, read_rows
from unpadded.bulk.rows import RejectedRow, Row

__all__ = ["Job", "RejectedRow", "Row", "Totals", "make_job", "read_ranges", "read_rows", "run_job"]
