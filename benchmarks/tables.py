"""Makes the tables of runs in the README and the docs anew, from the files under results/.

python benchmarks/tables.py
"""

from __future__ import annotations

from pathlib import Path

from awconv.compare.report import with_tables

ROOT = Path(__file__).parent.parent

if __name__ == "__main__":
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = page.read_text()
        after = with_tables(before, ROOT)
        if after != before:
            page.write_text(after)
            print(f"{page.relative_to(ROOT)}: made anew")
