"""The documents' tables are rendered, not typed."""

from bench import readme


def test_documents_show_the_newest_results() -> None:
    for path, text in readme.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m bench.readme"
