"""Settings of runs and studies, one a file."""
