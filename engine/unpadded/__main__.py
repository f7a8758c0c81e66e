"""`python -m unpadded`."""

from unpadded.cli.main import main

raise SystemExit(main())
