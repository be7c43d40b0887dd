"""What becomes of the benchmark's JSON files: tables on a terminal, Markdown, the pages, pictures.

``files`` reads results, ``tables`` shows one part of one file, ``pages`` puts files side by side
in the Markdown pages, ``pictures`` draws; ``command`` is ``python -m orthrus_fast.bench report``.
"""

from orthrus_fast.bench_report.command import main
from orthrus_fast.bench_report.tables import TABLES, show

__all__ = ["TABLES", "main", "show"]
