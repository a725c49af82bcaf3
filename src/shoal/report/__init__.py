"""Documents become pages, and messages become what a person sees.

write_run_report(folder)      a run folder → report.html, one self-contained file
live.view()                   messages of rank 0 → a progress bar, or plain lines
show_error(error, stream)     an error → one screen
write_prediction_page(path, doc) the document of `predict --compare` → a page
summary_lines(summary)        run.json → the closing lines after `train`
"""

from pathlib import Path

from shoal.report import live
from shoal.report.prediction import write_prediction_page
from shoal.report.text import show_error, summary_lines

__all__ = [
    "live",
    "show_error",
    "summary_lines",
    "write_prediction_page",
    "write_run_report",
]


def write_run_report(run_folder: Path) -> Path:
    """Write ``report.html`` into ``run_folder`` from the files that are there; gives its path.

    Damaged and missing files are named in the page. The file is replaced whole or not at all.
    Raises `RunFolderError` if there is no such folder or it cannot be written to, `DiskFull` if
    there is no space.
    """
    # Only here: numpy and the charts would cost every command 0.2 s.
    from shoal.report.page import write_page

    return write_page(Path(run_folder))
