"""Tables in Markdown."""


def table(header: list[str], rows: list[list], *, numbers: int = 0) -> str:
    """A Markdown table; the last `numbers` columns are aligned to the right."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in [header, rule, *rows])
