"""``python -m awconv``: the command line."""

from awconv.cli import main

raise SystemExit(main())
