"""What measures cost: scripts, and pipeline_cost, which examples/pipeline_cost.py starts."""
