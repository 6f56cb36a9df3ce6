"""Print docs/merging.md's table: how much of an update survives merging, as tests/support/survival.py computes it."""

from __future__ import annotations

from bench.machine import from_tests


def main() -> None:
    """The table, in Markdown."""
    survival = from_tests("survival")
    ways = survival.WAYS
    print(f"| size of the update | seen: {' | '.join(ways)} | error of y: {' | '.join(ways)} |\n{'|---' * 9}|")
    for row in survival.survivals():
        cells = [f"{100 * row.seen[way]:.1f} %" for way in ways] + [f"{row.error[way]:.1e}" for way in ways]
        print(f"| {' | '.join([f'{row.size:.1e}', *cells])} |")


if __name__ == "__main__":
    main()
