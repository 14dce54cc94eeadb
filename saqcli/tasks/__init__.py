"""What depends on the task: reading of labels."""
