"""What bounds training: see --help and benchmarks/pipeline_cost.py."""

from benchmarks.pipeline_cost import main

if __name__ == "__main__":
    main()
