"""What measures cost: each script runs by itself."""
