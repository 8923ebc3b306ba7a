"""`lit-fast report DIR`: what all processes of a run recorded, as one report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from lit_fast.profiler.files import read, write
from lit_fast.profiler.merge import merge, of_profiles
from lit_fast.profiler.record import Report


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lit-fast report",
        description="Merges the files of a folder, one of each process, into report.json and report.html.",
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="where StepProfiler(dirpath=...) wrote rank-00000.json, ...; or such a file, or report.json",
    )
    parser.add_argument("--output", type=Path, help="where to write to (default: the same folder)")
    parser.add_argument("--no-html", action="store_true", help="no report.html, which needs bokeh")
    parser.add_argument("--trace", action="store_true", help="the timeline for ui.perfetto.dev, and as Chrome's JSON")
    parser.add_argument("--quiet", action="store_true", help="print the names of the files only")
    options = parser.parse_args(argv)

    from lit_fast.errors import ProfileError
    from lit_fast.profiler.report import findings
    from lit_fast.profiler.report.terminal import print_report

    report = _report(options.folder)
    report.findings = report.findings or findings.find(report)
    if not options.quiet:
        print_report(report)
        print()
    output = options.output or (options.folder.parent if options.folder.is_file() else options.folder)
    made: dict[str, Callable[[Report, Path], object]] = {"report.json": write}
    if not options.no_html:
        from lit_fast.profiler.report.html import write_html

        made["report.html"] = write_html
    if options.trace:
        from lit_fast.profiler.report.trace import write_chrome, write_perfetto

        made |= {"trace.pftrace": write_perfetto, "trace.json": write_chrome}
    for name, make in made.items():
        path = output / name
        if path == options.folder:  # it is what was read
            continue
        try:
            make(report, path)
        except OSError as error:
            raise ProfileError(f"{path} cannot be written: {error.strerror}. --output names another folder.") from error
        print(f"written: {path}")
    return 0


def _report(path: Path) -> Report:
    """Of a folder, of one process's file, or as it was written."""
    if not path.is_file():
        return merge(path)
    found = read(path)
    return found if isinstance(found, Report) else of_profiles([found])
