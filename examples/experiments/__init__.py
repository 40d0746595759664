"""What the commands in examples/ share: data, views, training, evaluation, runs and reports."""

import os

# OpenMP reads it when torch is loaded. Threads that spin while they wait would take the cores from
# the loader's workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
