"""The pipeline behind `distill()`: configuration, data, networks, plan, training, export."""
