"""Trains a model from a config file: `varjax train`.

python train.py --config=configs/digits.py --config.steps=200
"""

import sys

from varjax.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
