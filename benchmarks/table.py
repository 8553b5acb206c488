"""The results as text: how a ratio, its target and a number of bytes are written, and the Markdown table."""

MISSING = "–"


def mark(met: bool | None, target: float | None, sign: str) -> str:
    """What follows a number: whether it met its target, and the target where not."""
    return "" if met is None else " ✓" if met else f" ✗ {sign} {target:g}"


def times(row: dict, name: str) -> str:
    """`against_eager` or `against_compile`, with its target."""
    value = row[f"against_{name}"]
    if value is None:
        return MISSING
    return f"{number(value['median'])}×{mark(row['met'][name], row['targets'][name], '≥')}"


def others(row: dict) -> str:
    """The ratios to further sides, such as another library, with their targets."""
    targets = row["targets"].get("others", {})
    return ", ".join(
        f"{side} {number(value['median'])}×{mark(row['met'][side], targets.get(side), '≥')}"
        for side, value in row.get("against_others", {}).items()
    )


def floor(row: dict) -> str:
    """Times the floor, with its target."""
    value = row["times_floor"]
    return (
        MISSING
        if value is None
        else f"{value['median']:.2f}{mark(row['met']['floor'], row['targets']['floor'], '≤')}"
    )


def quartiles(row: dict) -> str:
    """Between which ratios to torch half of the rounds lay."""
    value = row["against_eager"]
    return f"{number(value['low'])}–{number(value['high'])}"


def number(value: float) -> str:
    """Three digits of a ratio."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(count: int) -> str:
    """A number of bytes."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return (
                f"{count / factor:.3g} {unit}" if count < 1000 * factor else f"{count / factor:,.0f} {unit}"
            )
    return f"{count} B"


def saved(row: dict) -> str:
    """Kept for backward, ours against torch's."""
    value = row["saved_bytes"]
    return f"{size(value['fastreg'])} : {size(value['torch'])}" if value else MISSING


def peak(row: dict) -> str:
    """Extra memory, ours against torch's; as a share where the case has one."""
    value, share = row["peak_bytes"], row["peak_share"]
    text = f"{size(value['fastreg'])} : {size(value['torch'])}"
    if share:
        met = mark(row["met"]["peak"], row["targets"]["peak"] and 100 * row["targets"]["peak"], "≤")
        text += f" ({100 * share['fastreg']:.1f} % of the {row['peak_of']['what']}{met})"
    return text


def share(row: dict) -> str:
    """The share of the copy bandwidth that a row reaches."""
    value = row["share_of_bandwidth"]
    return MISSING if value is None else f"{100 * value:.0f} %"


def machine(results: dict) -> str:
    """One sentence on what the numbers were measured on."""
    m, build = results["machine"], results["machine"]["build"]
    threads = sorted({row["threads"] for row in results["rows"]}) or [results["settings"]["threads"]]
    plural = "s" if threads != [1] else ""
    on = f"{' and '.join(map(str, threads))} thread{plural} of {m['cpu']} ({m['cores']} cores)"
    if m["gpu"]:
        on = f"{m['gpu']['name']} (CUDA {m['gpu']['cuda']}), {m['cpu']}"
    load = f"; load average {m['load_before'][0]:g} before" if m["load_before"] else ""
    return (
        f"{on}, {build['instruction_set']} kernels, autograd in {m['autograd']['path']}, torch "
        f"{m['torch']}, fastreg {build['version']} built by {build['compiler']}; copying moves "
        f"{results['copy_bandwidth'] / 1e9:.1f} GB/s{load}."
    )


def reached(results: dict) -> str:
    """How many targets were met, and what the marks mean."""
    verdicts = [met for row in results["rows"] for met in row["met"].values() if met is not None]
    slower = [row for row in results["rows"] if row["against_eager"]["median"] < 1]
    text = (
        f"{sum(verdicts)} of {len(verdicts)} targets met (✓), the others missed (✗)."
        if verdicts
        else "No targets at these sizes."
    )
    return text + (f" {len(slower)} of {len(results['rows'])} rows are slower than torch." if slower else "")


def spread(results: dict) -> str:
    """How far the ratios scattered."""
    ratios = [row["against_eager"] for row in results["rows"]]
    wide = sorted(100 * (ratio["high"] - ratio["low"]) / ratio["median"] for ratio in ratios)
    median, worst = wide[len(wide) // 2], wide[-1]
    return f"Half of a row's ratios lie within {median:.0f} % (median row), {worst:.0f} % (worst)."


def columns(results: dict) -> list[tuple]:
    """Title and content of each column after the first."""
    gpu = [("of copy bandwidth", share)] if results["machine"]["gpu"] else []
    return [
        ("against torch", lambda row: times(row, "eager")),
        ("against torch.compile", lambda row: times(row, "compile")),
        ("times the floor", floor),
        ("kept for backward", saved),
        ("extra memory", peak),
        *gpu,
    ]


def name(row: dict) -> str:
    """The first cell."""
    return f"{row['work']}, {row['dtype']}, {row['size']}"


def ordered(results: dict) -> list[dict]:
    """The rows, those of the same work together."""
    works = list(dict.fromkeys(row["work"] for row in results["rows"]))
    return sorted(results["rows"], key=lambda row: works.index(row["work"]))


def markdown(results: dict) -> str:
    """The block for a README: what it was measured on, the table, and what failed."""
    shown = columns(results)
    lines = [
        "<!-- written by `fastreg bench --markdown results.json` -->",
        machine(results),
        "",
        f"| work | {' | '.join(title for title, _ in shown)} |",
        "|---" * (1 + len(shown)) + "|",
        *(f"| {name(row)} | {' | '.join(cell(row) for _, cell in shown)} |" for row in ordered(results)),
        "",
    ]
    if results["rows"]:
        floors = dict.fromkeys(
            f"{row['op']}: {row['floor_is']}" for row in results["rows"] if row["floor_is"]
        )
        lines += [
            f"{reached(results)} {spread(results)} Memory is ours : torch's. The floor is, for "
            f"{'; '.join(floors)}.",
            "",
        ]
    beside = [f"{name(row)}: {others(row)}" for row in ordered(results) if others(row)]
    if beside:
        lines += [f"Against others: {'; '.join(beside)}.", ""]
    lines += [f"Failed: {failure['error']}\n" for failure in results["failed"]]
    if results["partial"]:
        lines.append(f"Interrupted after {len(results['rows'])} of {results['planned']} cases.\n")
    return "\n".join(lines).rstrip("\n") + "\n"
