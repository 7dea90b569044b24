"""Quality of merged adapters on real tasks: training, merging, scoring and tables."""
