"""What a run says of its speed."""

import json
from pathlib import Path

from mae.run.metrics import read_metrics
from tests.processes import command, run


def test_run_logs_utilisation_and_memory_and_traces_ten_steps_if_asked(tmp_path: Path, built_in: Path) -> None:
    output = run(command(tmp_path, built_in, "name=measured", "max_steps=24", "profile=true", "micro_batch=32"))
    assert "MFU" in output
    rows = [row for row in read_metrics(tmp_path / "measured" / "metrics.csv") if "perf/mfu" in row]
    assert len(rows) == 24
    assert all(0 < float(row["perf/mfu"]) < 1 for row in rows)
    assert all(0.1 < float(row["perf/memory_gb"]) < 24 for row in rows)
    summary = json.loads((tmp_path / "measured" / "summary.json").read_text())
    assert summary["mfu"] > 0 and summary["memory_gb"] > 0 and 0 <= summary["data_wait"] < 1
    trace = json.loads((tmp_path / "measured" / "trace.json").read_text())
    steps = [event for event in trace["traceEvents"] if str(event.get("name", "")).startswith("ProfilerStep#")]
    assert len({event["name"] for event in steps}) == 10
