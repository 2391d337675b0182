"""Which fields of a mode's rows the table on the terminal has, under which headings."""

from .report import table

DECODE = {
    "what": "what",
    "batch": "batch",
    "context": "context",
    "rows": "rows",
    "tokens": "tokens",
    "ms": "ms",
    "tokens_per_s": "tokens/s",
    "limit_ms": "limit ms",
    "share": "share of limit",
    "matmul_bound": "matmuls by",
    "attention_bound": "attention by",
    "hf_ms": "hf ms",
    "vllm_ms": "vllm ms",
    "speed_ours_over_peer": "speed ours/theirs",
}
RUNS = {
    "workload": "workload",
    "concurrency": "at most",
    "at_once": "at once",
    "requests": "requests",
    "seconds": "seconds",
    "output_tokens_per_s": "output tok/s",
    "input_tokens_per_s": "input tok/s",
    "total_tokens_per_s": "total tok/s",
    "limit_s": "limit s",
    "share": "share of limit",
    "preemptions": "preempted",
    "cached_tokens": "cached tokens",
    "hf_seconds": "hf s",
    "vllm_seconds": "vllm s",
    "speed_ours_over_peer": "speed ours/theirs",
}
LATENCIES = {
    "workload": "workload",
    "concurrency": "at most",
    "which": "ms",
    "mean": "mean",
    "p50": "p50",
    "p90": "p90",
    "p95": "p95",
    "p99": "p99",
}
LOADS = {
    "what": "what",
    "format": "format",
    "gb": "GB",
    "seconds": "seconds (median)",
    "first_s": "first",
    "gb_per_s": "GB/s",
}


def text_of(mode: str, rows: list[dict]) -> str:
    """The table, or tables, of a mode's rows."""
    if mode in ("startup", "start"):
        return _starts(rows)
    if mode != "throughput":
        return table(rows, LOADS if mode == "load" else DECODE)
    latencies = [
        {"workload": row["workload"], "concurrency": row["concurrency"], "which": name.upper(), **row[f"{name}_ms"]}
        for row in rows
        for name in ("ttft", "tpot", "itl", "e2e")
        if row[f"{name}_ms"]
    ]
    return f"{table(rows, RUNS)}\n\n{table(latencies, LATENCIES)}"


def _starts(rows: list[dict]) -> str:
    """Seconds by phase, and of what went on beside."""
    seconds = [{**row["phases"], **{f"({name})": s for name, s in row["beside"].items()}} for row in rows]
    names = list(dict.fromkeys(name for of_row in seconds for name in of_row))
    ends = {"total_s": "total s", "executables": "executables"}
    lines = [
        {"start": row.get("cache", "here"), **of_row, **{end: row[end] for end in ends}}
        for row, of_row in zip(rows, seconds, strict=True)
    ]
    return table(lines, {"start": "start", **{name: name for name in names}, **ends})


def name_of(row: dict) -> str:
    """Which measurement a row is of, in a few words."""
    if row["what"] == "decode":
        return f"decode, batch {row['batch']}"
    if row["what"] == "throughput":
        return f"{row['workload']}, {row['at_once']} at once"
    return f"{row['what']} {row['rows']}x{row['tokens']}"


def ceilings_text(ceilings: dict) -> str:
    """What was measured of the devices, in one sentence."""
    parts = [f"copy {ceilings['bytes_per_s'] / 1e9:.4g} GB/s", f"matmul {ceilings['flops_per_s'] / 1e12:.4g} TFLOP/s"]
    if ceilings["all_reduce_s"]:
        parts.append(f"all-reduce {1e6 * ceilings['all_reduce_s']:.3g} us")
    if "matmul" in ceilings:
        rates = ceilings["matmul"]
        parts.append(
            f"float32 matmul of JAX {rates['jax_flops_per_s'] / 1e9:.4g} and of torch "
            f"{rates['torch_flops_per_s'] / 1e9:.4g} GFLOP/s (ratio {rates['jax_over_torch']:.3g})"
        )
    return ", ".join(parts)
