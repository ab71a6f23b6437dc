"""Checks whether the server answers, for a container's health check: exit code 0 or 1.

python deployment/server/health.py 127.0.0.1:8443 /kit/ca.pem
"""

import sys
from pathlib import Path

from common import MedFLError
from federation.runtime.processes import is_healthy, parse_address


def main() -> None:
    address, ca = sys.argv[1:]
    try:
        sys.exit(0 if is_healthy(*parse_address(address), ca=Path(ca)) else 1)
    except MedFLError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
