"""What depends on the task: class labels."""
