"""What happens over time: checkpoints, monitors, validation, evaluation, writers."""
