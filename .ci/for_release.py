"""Write a public repository's address into a checkout that is about to be released, in place.

The sources name no address, so that a copy of the repository is complete wherever it stands. A package index knows no
relative links: there they become absolute, to the files at the released tag, and the project gets its URLs.

    python .ci/for_release.py https://HOST/OWNER/NAME TAG
"""

import re
import sys
from pathlib import Path

LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)")
IMAGES = (".svg", ".png")


def absolute(text: str, repository: str, tag: str) -> str:
    """The Markdown `text` with its relative links, images too, made absolute."""

    def replace(found: "re.Match[str]") -> str:
        path = found[1]
        if path.startswith("../../"):  # a page of the repository, not a file
            return f"]({repository}/{path.removeprefix('../../')})"
        return f"]({repository}/{'raw' if path.endswith(IMAGES) else 'blob'}/{tag}/{path})"

    return LINK.sub(replace, text)


def with_urls(project: str, repository: str, tag: str) -> str:
    """The text of pyproject.toml with the project's URLs."""
    urls = {
        "Homepage": repository,
        "Documentation": f"{repository}/blob/{tag}/docs/index.md",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    lines = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    table = "[project.optional-dependencies]"
    return project.replace(table, f"[project.urls]\n{lines}\n{table}", 1)


def main() -> None:
    """Rewrite README.md and pyproject.toml of the current folder."""
    if len(sys.argv) != 3 or not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", sys.argv[1]):
        raise SystemExit(f"usage: {sys.argv[0]} https://HOST/OWNER/NAME TAG")
    repository, tag = sys.argv[1:]
    for name, change in (("README.md", absolute), ("pyproject.toml", with_urls)):
        path = Path(name)
        path.write_text(change(path.read_text(encoding="utf-8"), repository, tag), encoding="utf-8")


if __name__ == "__main__":
    main()
