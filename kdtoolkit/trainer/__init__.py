"""The training loop, with its optimizer, schedule, evaluation and metrics log."""
