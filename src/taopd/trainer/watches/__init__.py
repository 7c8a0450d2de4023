"""What is watched while a run trains, and said once: collapse, the teacher, the situation, the spread of C."""
