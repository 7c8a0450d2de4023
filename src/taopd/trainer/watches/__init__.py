"""What is watched in training, and said once: collapse, the teacher, the situation, the spread of C."""
