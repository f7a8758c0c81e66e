"""`python -m unpadded`."""

from unpadded.cli import main

raise SystemExit(main())
