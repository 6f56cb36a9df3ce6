"""The README's table is rendered, not typed."""

from bench import readme


def test_readme_shows_the_newest_result() -> None:
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.rendered(text) == text, "run: python -m bench.readme"
