"""Old place of `python -m mae.report.summary`; `python -m mae.summary` goes on working."""

import sys

from mae.report.show_summary import main

if __name__ == "__main__":
    sys.exit(main())
