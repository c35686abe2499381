"""What a run says and leaves behind: console, metric files, environment, checkpoints, report."""
