"""`lit-fast report DIR`: what all processes of a run recorded, as one report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lit-fast report",
        description="Merges the files of a folder, one of each process, into report.json and report.html.",
    )
    parser.add_argument("folder", type=Path, help="where StepProfiler(dirpath=...) wrote rank-00000.json, ...")
    parser.add_argument("--output", type=Path, help="where to write to (default: the same folder)")
    parser.add_argument("--no-html", action="store_true", help="no report.html, which needs bokeh")
    parser.add_argument("--trace", action="store_true", help="the timeline for ui.perfetto.dev, and as Chrome's JSON")
    parser.add_argument("--quiet", action="store_true", help="print the names of the files only")
    options = parser.parse_args(argv)

    from lit_fast.profiler.merge import merge
    from lit_fast.profiler.record import write
    from lit_fast.profiler.report import findings
    from lit_fast.profiler.report.terminal import print_report

    report = merge(options.folder)
    report.findings = findings.find(report)
    if not options.quiet:
        print_report(report)
        print()
    output = options.output or options.folder
    write(report, output / "report.json")
    written = [output / "report.json"]
    if not options.no_html:
        from lit_fast.profiler.report.html import write_html

        write_html(report, output / "report.html")
        written.append(output / "report.html")
    if options.trace:
        from lit_fast.profiler.report.trace import write_chrome, write_perfetto

        for make, name in ((write_perfetto, "trace.pftrace"), (write_chrome, "trace.json")):
            make(report, output / name)
            written.append(output / name)
    for path in written:
        print(f"written: {path}")
    return 0
