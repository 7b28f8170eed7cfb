import sys

from varjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
