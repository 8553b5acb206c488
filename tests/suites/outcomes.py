"""A plugin of pytest that writes the outcome of every test to a file at once, so that a run which is ended,
or which ends its process, leaves what it has found.
"""

import json
import os
import sys


def pytest_runtest_logreport(report):
    """One line per phase that matters: the call, and whatever fails or is skipped around it."""
    if report.when != "call" and report.passed:
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "text": str(report.longrepr or "")[-3000:]}
    if hasattr(report, "wasxfail"):
        line["outcome"] = "skipped" if report.skipped else "failed"
    plugin = sys.modules.get("fastreg.testing.patched")
    if plugin is not None and plugin._running:
        line["summary"] = plugin._running[0].summary()
    with open(os.environ["OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")
