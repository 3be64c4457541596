"""Images in files and folders: what there is to do, who does it, and doing it."""

from ddrf_fast.batch.plan import Job, Plan, check_outputs, is_folder, plan
from ddrf_fast.batch.run import Report, Work, run, write_output
from ddrf_fast.batch.share import Share

__all__ = [
    "Job",
    "Plan",
    "Report",
    "Share",
    "Work",
    "check_outputs",
    "is_folder",
    "plan",
    "run",
    "write_output",
]
