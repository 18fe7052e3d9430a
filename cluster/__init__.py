"""What one runs: configuration, placement, jobs and the command line."""
