"""What Roost reaches, measured: one command each, the baseline in the same run."""
