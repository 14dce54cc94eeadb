"""What depends on the task: outputs, losses, scores, and the reading of labels."""
