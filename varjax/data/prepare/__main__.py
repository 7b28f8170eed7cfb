import sys

from varjax.data.prepare.prepare import main

sys.exit(main(sys.argv[1:]))
