"""`python -m faults`."""

from faults.runner import main

raise SystemExit(main())
