"""`python -m tinytorch.profiling cnn --train`: the same as `tinytorch profile cnn --train`."""

import sys

from tinytorch.profiling.report import main

sys.exit(main(sys.argv[1:]))
