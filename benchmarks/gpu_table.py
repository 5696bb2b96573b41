"""What docs/gpu.json holds as Markdown tables; `python benchmarks/gpu.py --table docs/gpu.json` prints them."""

# Columns of each section's table: (heading, key of a row, how to write it).
COLUMNS = {
    "correctness": [
        ("operator", "what", "{}"),
        ("dtype", "dtype", "{}"),
        ("cases", "cases", "{}"),
        ("worst relative error", "worst_error", "{:.1e}"),
        ("worst of log-sum-exp", "worst_lse_error", "{:.1e}"),
        ("off", "off", "{}"),
        ("refused", "refused", "{}"),
        ("failed", "failed", "{}"),
    ],
    "kernels": [
        ("shape", "shape", "{}"),
        ("dtype", "dtype", "{}"),
        ("what", "what", "{}"),
        ("µs", "us", "{:.1f}"),
        ("ratio to dense", "ratio", "{:.2f}"),
        ("relative error", "error", "{:.1e}"),
        ("peak above the output, MB", "peak_mb", "{:.1f}"),
        ("timed", "how", "{}"),
    ],
    "unet": [
        ("what", "what", "{}"),
        ("how", "how", "{}"),
        ("ms a step", "ms", "{:.2f}"),
        ("ratio to unpatched", "ratio", "{:.3f}"),
        ("compiling, s", "compile_s", "{:.0f}"),
        ("relative difference from eager", "error", "{:.1e}"),
        ("changed by tune", "changed", "{:.1e}"),
        ("new graphs", "new_graphs", "{}"),
        ("peak, MB", "peak_mb", "{:.0f}"),
    ],
    "backbones": [
        ("backbone", "what", "{}"),
        ("dtype", "dtype", "{}"),
        ("from reference", "reference", "{:.1e}"),
        ("compiled from eager: unpatched", "stock_compiled", "{:.1e}"),
        ("patched", "compiled", "{:.1e}"),
        ("largest: unpatched", "stock_compiled_largest", "{:.2g}"),
        ("patched", "compiled_largest", "{:.2g}"),
        ("eager from float32: unpatched", "stock_rounding", "{:.1e}"),
        ("patched", "rounding", "{:.1e}"),
        ("compiled from float32: unpatched", "stock_compiled_rounding", "{:.1e}"),
        ("patched", "compiled_rounding", "{:.1e}"),
        ("changed by the patch", "changed", "{:.1e}"),
        ("unpatched again", "restored", "{}"),
        ("graph", "graph", "{}"),
    ],
    "engine": [
        ("step", "what", "{}"),
        ("seconds", "seconds", "{:.1f}"),
        ("relative difference from eager", "error", "{:.1e}"),
        ("result", "result", "{}"),
    ],
}
COLUMNS |= {"flux": COLUMNS["unet"], "verbs": COLUMNS["engine"]}
# What a row's time is compared with: the row of this name that has the same values of these keys.
COMPARED = {
    "kernels": ("scaled_dot_product_attention", "us", ("shape", "dtype")),
    "unet": ("unpatched", "ms", ("how",)),
    "flux": ("unpatched", "ms", ("how",)),
}


def document(results):
    """All sections as Markdown, in the order in which they stand in the results."""
    parts = [section_text(name, section) for name, section in results["sections"].items()]
    return "# What a GPU showed\n\n`python benchmarks/gpu.py` writes these tables.\n\n" + "\n\n".join(parts) + "\n"


def section_text(name, section):
    """A heading, what it ran on, how it ended, and the table."""
    lines = [f"## {section['title']}", ""]
    if "machine" in section:
        machine = section["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
        lines += [
            f"{machine['device']}, {machine['cores']} cores, {versions}; code {machine['code']}; {section['date']}."
        ]
    took = f" after {section['seconds']:.0f} s" if "seconds" in section else ""
    why = f": {section['why']}" if section.get("why") else ""
    if section["status"] != "done":
        lines.append(f"**{section['status'].capitalize()}**{took}{why}.")
    if section.get("later"):
        lines.append(f"Later: {section['later']}.")
    lines += [f"{fact.replace('_', ' ').capitalize()}: {value}." for fact, value in _shown(section.get("facts", {}))]
    if section.get("rows"):
        lines += ["", *table(name, section["rows"])]
    return "\n".join(lines)


def _shown(facts):
    """The facts that a reader wants: not the list of each bad case."""
    for fact, value in facts.items():
        if isinstance(value, list):
            value = len(value) if value and isinstance(value[0], dict) else "; ".join(map(str, value))
        if value not in (None, ""):
            yield fact, value


def table(name, rows):
    """The lines of a section's table; a column that no row fills is left out."""
    rows = with_ratios(name, rows)
    columns = [column for column in COLUMNS[name] if any(row.get(column[1]) is not None for row in rows)]
    lines = [f"| {' | '.join(column[0] for column in columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = ["" if row.get(key) is None else form.format(row[key]) for _, key, form in columns]
        failures = [
            f"**failed**: {_one_line(text)}"
            for key, text in row.items()
            if key.endswith(("error_text", "compile_error"))
        ]
        cells[-1] = " ".join([cells[-1], *failures]).strip()
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def with_ratios(name, rows):
    """The rows with their time as a ratio to that of what they stand beside."""
    if name not in COMPARED:
        return rows
    base, key, same = COMPARED[name]
    bases = {tuple(row.get(k) for k in same): row[key] for row in rows if row["what"] == base and key in row}

    def ratio(row):
        beside = bases.get(tuple(row.get(k) for k in same))
        return row[key] / beside if beside and row.get(key) is not None else None

    return [{**row, "ratio": ratio(row)} for row in rows]


def _one_line(text):
    return " ".join(text.replace("|", "\\|").split())
